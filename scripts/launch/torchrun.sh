#!/usr/bin/env bash
# One machine, several processes. Arguments go to `adaptive-merge fit`:
#   PROCESSES=4 bash scripts/launch/torchrun.sh --config adamerging --run.name mine
# Several machines without SLURM: on each of them, with the same HEAD and JOB,
#   NODES=2 HEAD=node0:29400 JOB=mine PROCESSES=8 bash scripts/launch/torchrun.sh --config …
set -euo pipefail

PROCESSES=${PROCESSES:-2}
NODES=${NODES:-1}
if [ "$NODES" -gt 1 ]; then
  meet=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first machine, host:port}" --rdzv-id "${JOB:?a name}")
else
  meet=(--standalone)
fi
# One thread each, unless told otherwise: processes that share processors slow one another down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m torch.distributed.run "${meet[@]}" --nproc-per-node "$PROCESSES" -m adaptive_merge fit "$@" \
  --trainer.devices "$PROCESSES" --trainer.num_nodes "$NODES" --run.if_exists resume
