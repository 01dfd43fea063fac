#!/usr/bin/env bash
#SBATCH --job-name=adaptive-merge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# One node, one process for each GPU:
#   sbatch scripts/slurm/single_node.sh --config adamerging --run.name mine
# Three minutes before the time is up SLURM signals the processes (not this shell: no `B:`); they save, put the job
# back into the queue, and the next start goes on from there. `--gpus-per-task` would hide devices; the job's name
# must not be `bash` or `interactive`, which turn SLURM mode off.
set -euo pipefail

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec srun --kill-on-bad-exit=1 adaptive-merge fit "$@" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes 1 --run.if_exists resume
