#!/usr/bin/env bash
# Refresh launch/constraints.txt: the newest versions that go together, which launch/setup.sh then installs.
#
#   bash launch/constraints.sh
#
# Installs the package with all extras into a new environment without constraints, which takes pip some minutes, and
# writes down what it found. PYTHON: interpreter (default: python3; 3.11 or 3.12).
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet ".[dev]"
{
    echo "# Versions that launch/setup.sh installs (pip install -c), made by launch/constraints.sh. torch and what follows"
    echo "# its version (torchvision, triton, the CUDA libraries) are left out: they are taken from what is there."
    "$environment/bin/python" -m pip freeze --exclude memdlm_dist |
        grep -viE '^(torch|torchvision|triton|pytorch-triton|nvidia-.*|cuda-.*)(==| @)'
} >"$environment/constraints.txt"
mv "$environment/constraints.txt" launch/constraints.txt
echo "Written: launch/constraints.txt. Run bash tests/run.sh before you commit it."
