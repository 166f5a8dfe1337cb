#!/usr/bin/env bash
# Set up, prepare the built-in corpus, train a small model, validate it and show its memory.
#
# Usage: bash launch/quickstart.sh [--section.key value ...]
#
# Examples:
#   bash launch/quickstart.sh
#   bash launch/quickstart.sh --training.steps 3
#
# A second call continues from the last checkpoint, or reports that the run is complete.
#
# Hardware (environment):
#   NGPU  number of processes (default: all accelerators, or 2 on a CPU)
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
unset VIRTUAL_ENV # train.sh must use .venv, not an activated environment
if [[ ! -f data/quickstart/summary.json ]]; then
    .venv/bin/python tools/prepare_data.py --builtin --train-tokenizer 2048 --seq-len 128 \
        --held-out 0.03 --output data/quickstart --overwrite
fi
bash launch/train.sh train_configs/quickstart.toml "$@"
echo
echo "What the memory keeps of held-out text (one process). The table above has the default inner loop, 2 steps at"
echo "learning rate 0.1, which hardly changes a model this small. Here the inner loop does more:"
echo
.venv/bin/python tools/evaluate.py recall train_configs/quickstart.toml "$@" --anchor-ratio 0.5 \
    --parametric_memory.inner_epochs 16 --parametric_memory.learning_rate 1 ||
    echo "Skipped: this step needs a checkpoint that one process can load."
echo
echo "Output: outputs/quickstart (checkpoint/, tb/, validation.jsonl)"
echo "Curves: .venv/bin/tensorboard --logdir outputs/quickstart/tb"
