#!/usr/bin/env bash
#SBATCH --job-name=adaptive-merge
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --signal=SIGUSR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
# One job for each configuration of a folder, one GPU each, a run folder each, named after the file:
#   sbatch --array=0-6 scripts/slurm/array_of_recipes.sh configs/embedded --run.root runs/sweep
# The index picks from the sorted list of files; an index beyond its end has nothing to do.
set -euo pipefail

folder=${1:?a folder of configurations}
shift
files=("$folder"/*.yaml)
index=${SLURM_ARRAY_TASK_ID:?start it with --array}
if [ "$index" -ge "${#files[@]}" ]; then
  echo "there are ${#files[@]} configurations in $folder; nothing to do for index $index"
  exit 0
fi
config=${files[$index]}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec srun --kill-on-bad-exit=1 adaptive-merge fit --config "$config" --run.name "$(basename "$config" .yaml)" "$@" \
  --trainer.devices 1 --trainer.num_nodes 1 --run.if_exists resume
