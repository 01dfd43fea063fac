#!/usr/bin/env bash
# On a machine with a CUDA device: the tests that need one, then the benchmark, whose figures go into docs/gpu.md under
# the device's name. It uses the environment that it is started in, where `pip install --editable .[test]` was done.
#   bash scripts/gpu_check.sh                             # embedded encoder and ViT-B/32, T = 2, 4, 8
#   bash scripts/gpu_check.sh --model vit_b_32 --tasks 8  # arguments go to scripts/benchmark.py
# Exit code 2: there is no device; nothing was run and nothing written. 1: a test failed; nothing was written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check: $python sees no CUDA device here, so nothing was run and nothing written; adaptive-merge doctor" \
        "says what torch sees" >&2
    exit 2
}
figures="$(mktemp)"
trap 'rm -f "$figures"' EXIT
"$python" -m pytest -m cuda tests
"$python" scripts/benchmark.py --device cuda --json "$figures" "$@"
"$python" scripts/gpu_table.py "$figures"
