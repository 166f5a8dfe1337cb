#!/usr/bin/env bash
# Train on several nodes; run this command once on each node.
#
# Usage: NNODES=N RDZV_ENDPOINT=HOST:PORT bash launch/multinode.sh CONFIG.toml [torchrun flags --] [--section.key value]
#
# Example, on both nodes of two (node0 is the host name of one of them):
#   NNODES=2 RDZV_ENDPOINT=node0:29500 bash launch/multinode.sh train_configs/llada_8b_longalpaca.toml
#
# Layout (environment):
#   NNODES          number of nodes; with MIN:MAX the run starts with at least MIN nodes, one minute after they joined
#   NODE_RANK       number of this node, from 0 (default: the nodes agree on their numbers; the host of RDZV_ENDPOINT
#                   becomes node 0 if it is one of them)
#   NGPU            processes per node, the same on all nodes (default: all accelerators, or 2 on a CPU)
# Rendezvous (environment):
#   RDZV_ENDPOINT   HOST:PORT, the same on all nodes: a node that all nodes reach, and a free port on it
#   RDZV_ID         name of the job, if several share an endpoint (default: memdlm)
#   MAX_RESTARTS    number of times that torchrun restarts all ranks after a failure (default: 3)
#   TORCHRUN_FLAGS  further torchrun flags
set -euo pipefail

usage() { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

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

# launch/train.sh uses RENDEZVOUS instead of its single-node rendezvous.
RENDEZVOUS="--nnodes=$NNODES --rdzv-backend=c10d --rdzv-endpoint=$RDZV_ENDPOINT --rdzv-id=${RDZV_ID:-memdlm}"
RENDEZVOUS+=" --max-restarts=${MAX_RESTARTS:-3}${NODE_RANK:+ --node-rank=$NODE_RANK}"
export RENDEZVOUS
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
