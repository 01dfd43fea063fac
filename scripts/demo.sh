#!/usr/bin/env bash
# Merge eight fine-tuned experts and adapt the merge on unlabelled images: all set-up included. One half of the images is
# adapted on: a start in closed form, then a coefficient for each expert and layer; the other half is scored.
# Arguments go to `adaptive-merge fit`, for example: bash scripts/demo.sh --trainer.max_steps 20
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/adaptive-merge fit --config start_adamerging --data.protocol Holdout \
    --run.name demo --run.if_exists overwrite "$@"
