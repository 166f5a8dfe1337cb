#!/usr/bin/env bash
# Make .venv and install this package into it, unless that has been done, in the versions of launch/constraints.txt.
#
#   bash launch/setup.sh [EXTRA]
#
# EXTRA: an optional dependency group of pyproject.toml, such as dev.
# PYTHON: interpreter that makes the virtual environment (default: python3; 3.11 or 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
    echo "error: $python is not Python 3.11 or 3.12; set PYTHON to one that is." >&2
    exit 2
fi
if [[ ! -x .venv/bin/python ]]; then
    "$python" -m venv .venv
fi
# The stamp says what was installed; a change of these files or another extra installs again.
stamp=".venv/installed${extra:+-$extra}"
if [[ ! -f $stamp || pyproject.toml -nt $stamp || launch/constraints.txt -nt $stamp ]]; then
    echo "Installing memdlm_dist into .venv (the first time this takes a minute or two) ..."
    .venv/bin/python -m pip install --quiet --constraint launch/constraints.txt --editable ".${extra:+[$extra]}"
    touch "$stamp"
fi
