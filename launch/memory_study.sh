#!/usr/bin/env bash
# Run the study of docs/study.md: train one base, fine-tune it in all arms, and compare them.
#
# Usage: bash launch/memory_study.sh [data] [base] [screen] [confirm] [inference] [rest] [report]
#
# Examples:
#   bash launch/memory_study.sh
#   CANDIDATES=set_8,rate_0.02 bash launch/memory_study.sh confirm inference rest report
#
# Without arguments all stages run in the order above. Runs that are complete are kept, so the script continues after an
# interruption. It needs the [eval] extra and, to compile on a CPU, a C++ compiler.
#
# Environment:
#   CANDIDATES  arms to confirm besides plain, set_1 and set_2 (default: width,share_0.5, the best two of the screening)
#   WORKERS     number of runs at a time (default: one per accelerator, or per CPU core)
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
fi
candidates=${CANDIDATES:-width,share_0.5}
confirmed=plain,set_1,set_2,$candidates
data=data/needle
tasks=multi_value,variable_tracking,common_words,facts_1,facts_2
sizes=(--values 2 --digits 3 --hops 2 --letters 2 --common 1 --repeats 5 --rare-repeats 1 --facts 3 --words 10)
main=plain,set_1,set_2,set_4,set_8,set_16,rate_0.01,rate_0.02,rate_0.05,rate_0.3,width,set_2_rate_0.02,set_2_rate_0.3
main+=,set_2_width,share_0.5,share_0.25,late,set_2_share_0.5,decay_0.3,decay_1,smoothing_0.05,smoothing_0.1
rest=lora_plain,lora_set_1,lora_set_2,lora_dropout,rows_2000_plain,rows_2000_set_1,rows_2000_set_2,epoch_16_plain
rest+=,epoch_16_set_1,epoch_16_set_2,epoch_16_set_32,lr_high_plain,lr_high_set_1,lr_high_set_2,epoch_4_plain
rest+=,epoch_4_set_1,epoch_4_set_2,epoch_1_plain,epoch_1_set_1,epoch_1_set_2,lr_low_plain,lr_low_set_1,lr_low_set_2
sums=sums_plain,sums_set_1,sums_set_2,sums_rate_0.02
largest=rows_20000_plain,rows_20000_set_2

rows() { # NAME SAMPLES SEED: shards of needle tasks of 112 tokens
    [[ -f $data/$1.jsonl ]] || "$python" tools/needle_data.py --tokenizer $data/tokenizer --output $data/"$1".jsonl \
        --part train --lengths 112 --samples "$2" --seed "$3" --tasks $tasks "${sizes[@]}"
    [[ -f $data/$1/summary.json ]] || "$python" tools/prepare_data.py --input $data/"$1".jsonl \
        --tokenizer $data/tokenizer --seq-len 112 --held-out 0 --output $data/"$1" --overwrite
}

data() {
    env -u SIZE -u DATA -u OUT bash launch/needle.sh data
    rows rows-600 120 1
    rows rows-2000 400 1
    rows rows-20000 4000 1
    rows rows-heldout 40 2
    [[ -f $data/sums.jsonl ]] || "$python" - $data/sums.jsonl <<'PYTHON'
import json, pathlib, random, sys
draw = random.Random(0)
pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(2000)]
rows = [{"prompt": f"What is {a} + {b}? Answer:", "response": f" {a + b}."} for a, b in pairs]
pathlib.Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON
    [[ -f $data/sums/summary.json ]] || "$python" tools/prepare_data.py --input $data/sums.jsonl \
        --tokenizer $data/tokenizer --seq-len 24 --held-out 0.1 --output $data/sums --overwrite
}

base() {
    env -u SIZE -u DATA -u OUT bash launch/needle.sh base
}

study() { # ARMS SEEDS EVALUATIONS
    "$python" tools/study.py run launch/memory_study.toml --output outputs/study --arms "$1" --seeds "$2" --evaluations "$3" \
        ${WORKERS:+--workers "$WORKERS"}
}

screen() {
    study $main 0 within
}

confirm() {
    study "$confirmed" 1,2,3,4,5 within
    study "$confirmed" 1,2,3,4,5 within,new_names,beyond,exposure
}

inference() {
    study plain,set_1,set_2 1 "$("$python" -c '
import tomllib
names = tomllib.load(open("launch/memory_study.toml", "rb"))["evaluations"]
print(",".join(name for name in names if name.startswith("inference_")))')"
}

rest() {
    study $sums 0 before
    study $rest 0 ''
    study $largest 0 ''
}

report() {
    results=outputs/study/study.json
    "$python" tools/study.py report $results --seeds 0 --arms "$main" --evaluations within --plots outputs/study/screen
    "$python" tools/study.py report $results --seeds 0 --arms "$rest,$sums,$largest" --plots outputs/study/rest
    for against in set_1 plain; do # the registered comparisons
        "$python" tools/study.py report $results --seeds 1,2,3,4,5 --arms "$confirmed" --against $against \
            --comparisons 7 --evaluations within,new_names,beyond,exposure --plots outputs/study/confirm
    done
    "$python" tools/study.py report $results --seeds 1 --arms plain,set_1,set_2 --plots outputs/study/inference
}

for stage in "${@:-data base screen confirm inference rest report}"; do
    for one in $stage; do
        case $one in
        data | base | screen | confirm | inference | rest | report) "$one" ;;
        *)
            echo "error: There is no stage '$one'; choose data, base, screen, confirm, inference, rest or report." >&2
            exit 2
            ;;
        esac
    done
done
