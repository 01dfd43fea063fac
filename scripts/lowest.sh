#!/usr/bin/env bash
# The fast tests with the lowest versions that pyproject.toml declares, in a virtual environment of their own,
# .venv-lowest. Without the extra `export`, which needs a later torch than the rest. Python 3.11 only: the lowest
# versions have no wheels for later ones; PYTHON names another interpreter. Arguments go to pytest instead of the fast
# tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-$(command -v python3.11 || command -v python3)}"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "the lowest versions need Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
venv=.venv-lowest
[ -x $venv/bin/python ] || "$python" -m venv $venv
stamp="$(cksum pyproject.toml)"
if [ "$(cat $venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "Installing the lowest versions into $venv ..."
    $venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    VIRTUAL_ENV=$venv $venv/bin/uv pip install --quiet --resolution lowest-direct --editable ".[report,clip,test]"
    echo "$stamp" > $venv/installed
fi
fast=(tests/adapters tests/coefficients tests/engine tests/merge tests/objectives tests/transforms tests/export
    tests/cli/test_commands.py tests/report/test_report_html.py tests/weights/test_huggingface_models.py)
[ $# -gt 0 ] || set -- "${fast[@]}"
$venv/bin/python -m pytest "$@"
