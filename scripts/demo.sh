#!/usr/bin/env bash
# Merge eight fine-tuned experts and adapt the merge on unlabelled images: all set-up included.
# Arguments go to `adaptive-merge fit`, for example: bash scripts/demo.sh --trainer.max_steps 100
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/adaptive-merge fit --config adamerging --trainer.max_steps 200 \
    --run.name demo --run.if_exists overwrite "$@"
