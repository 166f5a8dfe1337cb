#!/usr/bin/env bash
# Run the needle experiment: train one base, fine-tune it with plain masked diffusion and with MemDLM, and compare.
#
# Usage: bash launch/needle.sh [data] [base] [tune] [evaluate] [report]
#
# Examples:
#   bash launch/needle.sh
#   SIZE=gpu SEEDS=0 bash launch/needle.sh
#   SIZE=gpu bash launch/needle.sh evaluate report
#
# Without arguments all stages run in the order above. Existing results are kept, so the script continues after an
# interruption. It needs the [eval] extra and, to compile on a CPU, a C++ compiler.
#
# Model (environment):
#   SIZE   cpu: 1.3 million parameters, about 90 minutes on two cores; gpu: 28 million, about three times the length
#          (default: cpu)
#   SEEDS  seeds of the fine-tuned runs (default: "0 1 2")
# Output (environment):
#   DATA   folder for the data (default: data/needle, or data/needle-gpu)
#   OUT    folder for the runs and reports (default: outputs/needle, or outputs/needle-gpu)
# Hardware (environment):
#   NGPU   number of processes (default: all accelerators, or 1 with all cores on a CPU)
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,22s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
size=${SIZE:-cpu}
seeds=${SEEDS:-0 1 2}
python=python
if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then
    python=$PWD/.venv/bin/python
fi

case $size in
cpu)
    DATA=${DATA:-data/needle} OUT=${OUT:-outputs/needle}
    short_length=84 lengths=112,160 length=160 samples=2000 questions=40 new_tokens=16
    model=() base=() tune=()
    short_sizes=(--values 1 --digits 3 --hops 1 --letters 2 --common 1 --repeats 4 --rare-repeats 1 --facts 2 --words 10)
    sizes=(--values 2 --digits 3 --hops 2 --letters 2 --common 1 --repeats 5 --rare-repeats 1 --facts 3 --words 10)
    ;;
gpu)
    DATA=${DATA:-data/needle-gpu} OUT=${OUT:-outputs/needle-gpu}
    short_length=192 lengths=256,512 length=512 samples=20000 questions=200 new_tokens=48
    model=(--model.flavor needle_gpu --training.mixed_precision_param bfloat16)
    base=(--training.seq_len 192 --training.global_batch_size 128 --training.steps 20000 --optimizer.lr 1e-3
        --checkpoint.interval 2000 --validation.freq 2000)
    tune=(--training.seq_len 512 --training.steps 2000 --optimizer.lr 1e-4 --checkpoint.interval 2000
        --validation.freq 250)
    short_sizes=(--values 2 --digits 4 --hops 2 --letters 3 --common 2 --repeats 6 --rare-repeats 1 --facts 4 --words 20)
    sizes=(--values 4 --digits 5 --hops 4 --letters 3 --common 3 --repeats 10 --rare-repeats 2 --facts 6 --words 20)
    ;;
*)
    echo "error: SIZE must be cpu or gpu, but is '$size'." >&2
    exit 2
    ;;
esac
tasks=multi_value,variable_tracking,common_words,facts_1,facts_2
model+=(--model.hf_assets_path "$DATA/tokenizer")

if [[ -z ${NGPU:-} ]]; then
    NGPU=$("$python" -c 'import torch; print(torch.accelerator.device_count() or 1)')
fi
export NGPU

needles() { # NAME PART LENGTHS SAMPLES FORMAT SEED TASKS SIZES...
    [[ -f $DATA/$1.jsonl ]] || "$python" tools/needle_data.py --tokenizer "$DATA/tokenizer" --output "$DATA/$1.jsonl" \
        --part "$2" --lengths "$3" --samples "$4" --format "$5" --seed "$6" --tasks "$7" "${@:8}"
}

shards() { # NAME SEQ_LEN HELD_OUT SOURCE...
    [[ -f $DATA/$1/summary.json ]] || "$python" tools/prepare_data.py "${@:4}" --tokenizer "$DATA/tokenizer" \
        --seq-len "$2" --held-out "$3" --output "$DATA/$1" --overwrite
}

data() {
    mkdir -p "$DATA"
    if [[ ! -d $DATA/tokenizer ]]; then
        # The final tokenizer is trained on needle tasks, whose lengths are measured with a first tokenizer.
        "$python" tools/prepare_data.py --builtin --train-tokenizer 2048 --seq-len 256 --output "$DATA/first" --overwrite
        "$python" tools/needle_data.py --tokenizer "$DATA/first/tokenizer" --lengths 192 --samples 1600 --tasks $tasks \
            --format text --output "$DATA/first.jsonl" --overwrite "${short_sizes[@]}"
        "$python" tools/prepare_data.py --input "$DATA/first.jsonl" --train-tokenizer 2048 --seq-len 128 \
            --output "$DATA/second" --overwrite
        cp -r "$DATA/second/tokenizer" "$DATA/tokenizer"
    fi
    shards text "$short_length" 0.01 --builtin
    needles repeat train "$short_length" $((samples * 6)) prompt_response 5 repeat "${short_sizes[@]}"
    needles short train "$short_length" $((samples * 4)) prompt_response 3 $tasks "${short_sizes[@]}"
    needles short_heldout heldout "$short_length" 40 prompt_response 0 $tasks "${short_sizes[@]}"
    needles train train "$lengths" "$samples" prompt_response 1 $tasks "${sizes[@]}"
    needles heldout heldout "$lengths" 40 prompt_response 9 $tasks "${sizes[@]}"
    for name in repeat short; do shards $name "$short_length" 0.005 --input "$DATA/$name.jsonl"; done
    shards short_heldout "$short_length" 0 --input "$DATA/short_heldout.jsonl"
    shards train "$length" 0.005 --input "$DATA/train.jsonl"
    shards heldout "$length" 0 --input "$DATA/heldout.jsonl"
}

base() {
    bash launch/train.sh train_configs/needle_base.toml --job.dump_folder "$OUT/base" "${model[@]}" "${base[@]}" \
        --data.train "$DATA/text/train,$DATA/repeat/train,$DATA/short/train" \
        --data.validation "$DATA/short_heldout/train"
}

base_checkpoint() {
    find "$OUT/base/checkpoint" -maxdepth 1 -name 'step-*' | sort -V | tail -1
}

run_flags() { # flags that the fine-tuned runs and their evaluations share
    flags=("${model[@]}" "${tune[@]}" --data.train "$DATA/train/train" --data.validation "$DATA/heldout/train")
}

tune() {
    run_flags
    for seed in $seeds; do
        for arm in mdlm memdlm; do
            bash launch/train.sh "train_configs/needle_$arm.toml" --job.dump_folder "$OUT/$arm-$seed" "${flags[@]}" \
                --debug.seed "$seed" --data.shuffle_seed "$((9176 + seed))" \
                --checkpoint.initial_load_path "$(base_checkpoint)"
        done
    done
}

evaluate() {
    run_flags
    for run in base $(for seed in $seeds; do echo "mdlm-$seed" "memdlm-$seed"; done); do
        # heldout: new names and passages; train: those of training, in samples that the run has not seen.
        for part in heldout train; do
            if [[ ! -f $OUT/$run/needle-$part/needle.json ]]; then
                "$python" tools/evaluate.py needle train_configs/needle_memdlm.toml --part $part --seed 77 \
                    --checkpoint "$OUT/$run/checkpoint" --output "$OUT/$run/needle-$part" --lengths "$lengths" \
                    --samples "$questions" --new-tokens "$new_tokens" --tasks $tasks --batch-size 50 \
                    "${sizes[@]}" "${flags[@]}"
            fi
        done
    done
    if [[ ! -f $OUT/exposure/exposure_bias.json ]]; then
        "$python" tools/exposure_bias.py train_configs/needle_memdlm.toml --output "$OUT/exposure" --batch-size 50 \
            --samples 100 --names MDLM MemDLM "${flags[@]}" \
            --checkpoint "$OUT/mdlm-${seeds%% *}/checkpoint" "$OUT/memdlm-${seeds%% *}/checkpoint"
    fi
}

report() {
    folders() { for seed in $seeds; do echo -n "$OUT/$1-$seed${2:-},"; done | sed 's/,$//'; }
    for part in heldout train; do
        "$python" tools/evaluate.py compare base="$OUT/base/needle-$part" MDLM="$(folders mdlm "/needle-$part")" \
            MemDLM="$(folders memdlm "/needle-$part")" --output "$OUT/report-$part" --overwrite
    done
    "$python" tools/evaluate.py losses MDLM="$(folders mdlm)" MemDLM="$(folders memdlm)" \
        --output "$OUT/report" --overwrite
}

for stage in "${@:-data base tune evaluate report}"; do
    for one in $stage; do
        case $one in
        data | base | tune | evaluate | report) "$one" ;;
        *)
            echo "error: There is no stage '$one'; choose data, base, tune, evaluate or report." >&2
            exit 2
            ;;
        esac
    done
done
