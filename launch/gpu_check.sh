#!/usr/bin/env bash
# Check a machine with accelerators: speed, tests, short runs. Writes outputs/gpu_check/report.md.
#
#   bash launch/gpu_check.sh [--quick] [--only SECTION ...] [--budget SECONDS] [--output DIR] [--list]
#
# Twelve sections, the most valuable first, each for at most 8 minutes; --list names them. One that fails does not stop
# the next, and reports of several calls merge. --quick takes about ten minutes in all.
# Without an accelerator debug sizes run on the CPU: that checks the flow and measures nothing. --debug does so on a GPU.
# Exit status: 0 if all that ran passed, 1 if a section failed or took too long.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# An activated virtual environment first, then the one that launch/setup.sh made.
python=python
if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
fi
exec "$python" tools/gpu_check.py "$@"
