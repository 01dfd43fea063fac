#!/usr/bin/env bash
#SBATCH --job-name=adaptive-merge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Several nodes, one process for each GPU; the run folder has to be on a file system that all of them see:
#   sbatch --nodes 4 scripts/slurm/multi_node.sh --config adamerging --run.root /shared/runs
# `data.images_per_task` has to be a multiple of the number of processes: it counts images over all of them.
set -euo pipefail

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec srun --kill-on-bad-exit=1 adaptive-merge fit "$@" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" --run.if_exists resume
