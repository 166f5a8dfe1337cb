#!/usr/bin/env bash
# Create .venv and install this package into it with the versions of launch/constraints.txt, unless it is up to date.
#
# Usage: bash launch/setup.sh [EXTRA]
#
# Examples:
#   bash launch/setup.sh
#   bash launch/setup.sh dev
#
# Arguments:
#   EXTRA   optional dependency group of pyproject.toml: nf4, s3, eval, wandb, cluster or dev (default: none)
# Environment:
#   PYTHON  Python 3.11 or 3.12 interpreter that creates .venv (default: python3)
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:-}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
    echo "error: $python is not Python 3.11 or 3.12; set PYTHON to such an interpreter." >&2
    exit 2
fi
if [[ ! -x .venv/bin/python ]]; then
    "$python" -m venv .venv
fi
# The stamp file marks a finished installation; another extra or a newer dependency file installs again.
stamp=".venv/installed${extra:+-$extra}"
if [[ ! -f $stamp || pyproject.toml -nt $stamp || launch/constraints.txt -nt $stamp ]]; then
    echo "Installing memdlm_dist into .venv (the first time this takes a minute or two) ..."
    .venv/bin/python -m pip install --quiet --constraint launch/constraints.txt --editable ".${extra:+[$extra]}"
    touch "$stamp"
fi
