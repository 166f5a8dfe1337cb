#!/usr/bin/env bash
# Check a machine with accelerators: measure speed, run tests and short trainings, and write report.md.
#
# Usage: bash launch/gpu_check.sh [--quick] [--only SECTION ...] [--budget SECONDS] [--debug] [--output DIR] [--list]
#
# Examples:
#   bash launch/gpu_check.sh
#   bash launch/gpu_check.sh --quick
#   bash launch/gpu_check.sh --only bench_8b lora_8b --budget 900
#
# Selection:
#   --only SECTION ...  sections to run (default: all)
#   --quick             fewer rounds and sizes, at most 10 minutes in all; unless --only is given, only the sections
#                       environment, bench_8b, lora_8b, run_dense and decode
#   --list              list the sections and exit
# Hardware:
#   --budget SECONDS    time limit of the whole call (default: none; 600 with --quick)
#   --debug             debug sizes on an accelerator, to test the check itself
# Output:
#   --output DIR        folder for report, results and logs (default: outputs/gpu_check in the repository)
#
# Sections run the most valuable first, each for at most 8 minutes; if one fails, the next one still runs. The report
# keeps the results of earlier calls. Without an accelerator debug sizes run on the CPU, which tests the check itself and
# measures nothing.
# Exit status: 0 if all sections that ran passed, 1 if a section failed or exceeded its time limit, 130 if interrupted.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,25s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An activated virtual environment has priority over the one that launch/setup.sh created.
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
