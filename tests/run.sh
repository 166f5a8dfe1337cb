#!/usr/bin/env bash
# Set everything up on a fresh machine and run the tests.
#
#   bash tests/run.sh [pytest arguments]
#
# PYTHON: interpreter that makes the virtual environment (default: python3; 3.11 or 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-logo
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
