#!/usr/bin/env bash
# Run the tests: all set-up included. Arguments go to pytest, for example: bash scripts/test.sh -k merge
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
