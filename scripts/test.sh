#!/usr/bin/env bash
# Run the tests: all set-up included. Arguments go to pytest, for example: bash scripts/test.sh -k merge
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
.venv/bin/ruff check .
.venv/bin/mypy
# A file of tests stays in one process, for its fixtures are shared.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
