# shellcheck shell=bash
# Sourced by demo.sh and test.sh: a virtual environment in .venv with this package in it, made once.
# Needs Python 3.11 or newer; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "adaptive_merge needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
# The stamp holds what was installed, so that a changed pyproject.toml or another extra installs again.
want="${1:-} $(cksum pyproject.toml)"
if [ "$(cat .venv/installed 2>/dev/null)" != "$want" ]; then
    echo "Installing into .venv (a few minutes the first time) ..."
    # One command, torch uncapped: pip then pairs torch and torchvision by itself.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:-}"
    echo "$want" > .venv/installed
fi
