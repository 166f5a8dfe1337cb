#!/usr/bin/env bash
# Train on several nodes: run this once on each of them.
#
#   NNODES=N RDZV_ENDPOINT=HOST:PORT [NODE_RANK=I] bash launch/multinode.sh CONFIG.toml [torchrun flags --] [--section.key value ...]
#
# NNODES: number of nodes; MIN:MAX starts with what is there after a minute, at least MIN.
# RDZV_ENDPOINT: a host that all nodes reach, one of them, and a free port on it; the same everywhere.
# NODE_RANK: this node's number; none lets the nodes agree. Node 0 then is the one of the endpoint, or any.
# RDZV_ID: name of the job, if several share an endpoint (default: memdlm).
# MAX_RESTARTS: how often to start all ranks again after one fails (default: 3).
# NGPU, TORCHRUN_FLAGS: as for launch/train.sh; NGPU must be the same on all nodes.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    usage
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi
if [[ ! ${NNODES:-} =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]]; then
    echo "error: NNODES must be a number of nodes, or MIN:MAX, but is '${NNODES:-}'." >&2
    exit 2
fi
if [[ ! ${RDZV_ENDPOINT:-} =~ ^[^:]+:[0-9]+$ ]]; then
    echo "error: RDZV_ENDPOINT must be HOST:PORT, the same on all nodes, but is '${RDZV_ENDPOINT:-}'." >&2
    exit 2
fi
if [[ -n ${NODE_RANK:-} && ! $NODE_RANK =~ ^[0-9]+$ ]]; then
    echo "error: NODE_RANK must be a number from 0, or not be set, but is '$NODE_RANK'." >&2
    exit 2
fi

# What launch/train.sh puts in the place of a rendezvous of one node.
RENDEZVOUS="--nnodes=$NNODES --rdzv-backend=c10d --rdzv-endpoint=$RDZV_ENDPOINT --rdzv-id=${RDZV_ID:-memdlm}"
RENDEZVOUS+=" --max-restarts=${MAX_RESTARTS:-3}${NODE_RANK:+ --node-rank=$NODE_RANK}"
export RENDEZVOUS
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
