#!/usr/bin/env bash
# Train on one node; for several nodes see launch/multinode.sh.
#
# Usage: bash launch/train.sh CONFIG.toml [torchrun flags --] [--section.key value ...]
#
# Examples:
#   bash launch/train.sh train_configs/debug.toml
#   NGPU=1 bash launch/train.sh train_configs/debug.toml --training.steps 5 --parametric_memory.rank 4
#
# Hardware (environment):
#   NGPU             number of processes (default: all accelerators, or 2 on a CPU)
#   OMP_NUM_THREADS  threads per process (default: the node's cores divided by its processes)
#   TORCHRUN_FLAGS   further torchrun flags, such as --max-restarts=3
# Output (environment):
#   LOG_RANK         comma-separated local ranks whose output is shown (default: 0)
#
# On SIGTERM or SIGUSR1 the run finishes its step, saves, and exits with status 75. A second signal ends it at once.
set -euo pipefail

usage() { sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    usage
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi
config=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# An activated virtual environment has priority over the one that launch/setup.sh created.
python=python
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
fi

# Arguments before a lone -- are torchrun flags.
torchrun_flags=()
for argument in "$@"; do
    if [[ $argument == -- ]]; then
        while [[ $1 != -- ]]; do torchrun_flags+=("$1"); shift; done
        shift
        break
    fi
done

if [[ -z ${NGPU:-} ]]; then
    NGPU=$("$python" -c 'import torch; print(torch.accelerator.device_count() or 2)')
fi
if [[ ! $NGPU =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NGPU must be a positive number, but is '$NGPU'." >&2
    exit 2
fi

LOG_RANK=${LOG_RANK:-0}
for rank in ${LOG_RANK//,/ }; do
    if [[ ! $LOG_RANK =~ ^[0-9]{1,6}(,[0-9]{1,6})*$ ]] || ((10#$rank >= NGPU)); then
        echo "error: LOG_RANK must be local ranks below NGPU = $NGPU, separated by commas, but is '$LOG_RANK'." >&2
        exit 2
    fi
done

# shellcheck disable=SC2086  # RENDEZVOUS (of multinode.sh) and TORCHRUN_FLAGS are lists of words
exec "$python" -m memdlm_dist.runtime.launcher --nproc-per-node="$NGPU" \
    ${RENDEZVOUS:---rdzv-backend=c10d --rdzv-endpoint=localhost:0} \
    --local-ranks-filter="$LOG_RANK" --role=rank --tee=3 ${TORCHRUN_FLAGS:-} "${torchrun_flags[@]}" \
    -m memdlm_dist.train --job.config_file "$config" "$@"
