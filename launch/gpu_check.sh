#!/usr/bin/env bash
# Check a machine with accelerators: speed, tests, short runs. Writes outputs/gpu_check/report.md.
#
#   bash launch/gpu_check.sh [--quick] [--only SECTION ...] [--budget SECONDS] [--output DIR] [--list]
#
# Sections, the most valuable first, each for at most 8 minutes; --list names them. One that fails does not stop the
# next, and reports of several calls merge.
# --quick: environment, bench_8b, lora_8b, run_dense and decoding with fewer rounds, for at most 10 minutes in all.
# Without an accelerator debug sizes run on the CPU: that checks the flow and measures nothing. --debug does so on a GPU.
# DIR: for report, results and logs (default: outputs/gpu_check of the repository).
# Exit status: 0 if all that ran passed, 1 if a section failed or took too long.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An activated virtual environment first, then the one that launch/setup.sh made.
python=python
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi
needed='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("memdlm_dist", "torch", "torchtitan"))))'
if ! "$python" -P -c "$needed" 2>/dev/null; then
    echo "error: memdlm_dist is not installed for $python; run \`bash launch/setup.sh dev\` first." >&2
    exit 2
fi
exec "$python" "$root/tools/gpu_check.py" "$@"
