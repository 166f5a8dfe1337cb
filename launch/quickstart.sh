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
echo "What the memory keeps of held-out text, after more and larger inner steps than in training (one process):"
echo
status=0
.venv/bin/python tools/evaluate.py recall train_configs/quickstart.toml "$@" --anchor-ratio 0.5 \
    --parametric_memory.inner_epochs 16 --parametric_memory.learning_rate 1 --batch-size 8 || status=$?
if [[ $status == 2 ]]; then # a setting that this step does not support; the sentence above names it
    echo "Skipped: the run itself is complete."
elif [[ $status != 0 ]]; then
    exit "$status"
fi
echo
echo "Output: outputs/quickstart (checkpoint/, tb/, validation.jsonl)"
echo "Curves: .venv/bin/tensorboard --logdir outputs/quickstart/tb"
