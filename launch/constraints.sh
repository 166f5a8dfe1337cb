#!/usr/bin/env bash
# Refresh launch/constraints.txt with the newest compatible versions, which launch/setup.sh installs.
#
# Usage: bash launch/constraints.sh
#
# Examples:
#   bash launch/constraints.sh
#   PYTHON=python3.12 bash launch/constraints.sh
#
# Installs the package with all extras into a new environment without constraints, and writes the versions that pip
# chose. This takes some minutes.
#
# Environment:
#   PYTHON  Python 3.11 or 3.12 interpreter (default: python3)
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet ".[dev]"
{
    echo "# Versions that launch/setup.sh installs (pip install -c), written by launch/constraints.sh. torch and packages"
    echo "# tied to its version (torchvision, triton, CUDA libraries) are omitted, so that pip keeps installed ones."
    "$environment/bin/python" -m pip freeze --exclude memdlm_dist |
        grep -viE '^(torch|torchvision|triton|pytorch-triton|nvidia-.*|cuda-.*)(==| @)'
} >"$environment/constraints.txt"
mv "$environment/constraints.txt" launch/constraints.txt
echo "Written: launch/constraints.txt. Run bash tests/run.sh before you commit it."
