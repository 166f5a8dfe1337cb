#!/usr/bin/env bash
# From nothing to a trained model: set up, prepare the built-in corpus, train, validate.
#
#   bash launch/quickstart.sh [--section.key value ...]
#
# Run again, it continues from the last checkpoint or says that the run is complete.
# NGPU: number of processes (default: all accelerators, or 2 on a machine without any).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
unset VIRTUAL_ENV # what was just set up, whatever environment is active
if [[ ! -f data/quickstart/summary.json ]]; then
    .venv/bin/python tools/prepare_data.py --builtin --train-tokenizer 2048 --seq-len 128 \
        --held-out 0.03 --output data/quickstart --overwrite
fi
bash launch/train.sh train_configs/quickstart.toml "$@"
echo
echo "Output: outputs/quickstart (checkpoint/, tb/, validation.jsonl)"
echo "Curves: .venv/bin/tensorboard --logdir outputs/quickstart/tb"
