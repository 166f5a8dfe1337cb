"""Layouts, checkpoints and TensorBoard through the real entry point, on gloo."""

import json
import re
from itertools import pairwise

import pytest
from torch.distributed.checkpoint import FileSystemReader

from memdlm_dist.data.preparation.prepare import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from tests.support.launching import debug, launch, run_many, scalars
from tests.support.zygote import ROOT

STEPS = 3
TRACKED = (
    "loss_metrics/global_avg_loss",
    "grad_norm",
    "parametric_memory/inner_loss_step_1",
    "parametric_memory/inner_loss_step_2",
    "parametric_memory/inner_grad_norm_step_1",
    "parametric_memory/inner_grad_norm_step_2",
    "parametric_memory/fast_weight_norm",
    "parametric_memory/relative_write",
    "parametric_memory/anchor_nll_before",
    "parametric_memory/anchor_nll_step_2",
    "parametric_memory/anchor_nll_after",
    "diffusion/mask_ratio",
    "validation/loss_memory_off",
    "validation/loss_memory_on",
)
# All layouts start with the same weights and differ in summation order: float32 rounding, about 5e-7 measured, which
# optimizer steps amplify.
TOLERANCE = 1e-5

TP, CP = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
LOCAL = "--training.local_batch_size"
AC = "--activation_checkpoint.mode"
DETERMINISTIC = "--debug.deterministic"  # torch picks deterministic kernels, or raises where it has none
# name -> (processes, arguments); the global batch size is 4. test_invariance.py runs more layouts and more steps.
LAYOUTS = {
    "single": (1, [LOCAL, "4"]),
    "fsdp2": (2, [LOCAL, "2"]),
    "tp2": (2, [LOCAL, "4", TP, "2"]),
    "operator-checkpointing": (2, [LOCAL, "2", AC, "selective", "--activation_checkpoint.selective_ac_option", "op"]),
    "fsdp2-tp2-accumulation": (4, [LOCAL, "1", TP, "2"]),
    "cp2": (2, [LOCAL, "4", CP, "2", DETERMINISTIC]),
    "fsdp2-cp2": (4, [LOCAL, "2", CP, "2"]),
}
# Layouts on packed rows; compiled graphs take masks and positions as arguments.
PACKED = {
    "packed": (1, [LOCAL, "4"]),
    "packed-fsdp2-cp2": (4, [LOCAL, "2", CP, "2"]),
    "packed-compiled-cp2": (2, [LOCAL, "4", CP, "2", "--compile.enable", "--compile.backend", "aot_eager"]),
}
# Layouts on fine-tuning rows of different lengths, grouped by length; "resumed" runs its arguments after the first.
GROUPED = ["--data.group_by_length", "--data.shuffle_seed", "3"]
SAVE_2 = ["--checkpoint.enable", "--checkpoint.interval", "2"]
VARIED = {
    "varied": (1, [LOCAL, "4"]),
    # Without validation: tensor parallelism takes seconds for every new shape.
    "varied-tp2": (2, [LOCAL, "4", TP, "2", "--validation.no_enable"]),
    "varied-cp2-accumulation": (2, [LOCAL, "2", CP, "2"]),
    "varied-fsdp2-accumulation": (2, [LOCAL, "1", *SAVE_2]),
    "varied-resumed": (1, [LOCAL, "1", *SAVE_2]),
}
VARIED_STEPS = 4
COMMON = ["--model.flavor", "tiny", "--training.steps", "2", "--training.global_batch_size", "4"]
VALIDATED = ("single", "fsdp2", "tp2", "fsdp2-cp2", "packed", "packed-fsdp2-cp2")
# bfloat16 carries 8 bits: one rounding is 0.4%, and rounding accumulates over the layers.
BFLOAT16 = {"fsdp2-bfloat16": (2, [LOCAL, "2"]), "fsdp2-tp2-bfloat16": (4, [LOCAL, "2", TP, "2"])}
BFLOAT16_TOLERANCE = 0.03


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """Return the folder of all runs except the slow ones; one launch of Python serves all runs."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        layout_runs(root), option_runs(root, SINGLE_RUNS + SOME_RUNS), expert_runs(root), continued_runs(root),
        varied_runs(root),
    ]  # fmt: skip
    run_many([run for group in runs for run in group])
    return root


def layout_runs(root):
    """Return runs of a few steps from scratch on every layout."""
    # All 41 held-out sequences, a number that no layout divides evenly into batches.
    validation = ["--validation.enable", "--validation.local_batch_size", "14", "--validation.steps", "-1"]
    data = ["--data.train", str(root / "data/train"), "--data.validation", str(root / "data/heldout")]
    pack(root / "data")
    layouts = {
        **{name: (n, [*args, "--training.steps", str(STEPS)]) for name, (n, args) in LAYOUTS.items()},
        **{name: (n, [*args, "--training.mixed_precision_param", "bfloat16"]) for name, (n, args) in BFLOAT16.items()},
        **{name: (n, [*args, *data]) for name, (n, args) in PACKED.items()},
    }
    return [
        (n, debug(root / name, *COMMON, *args, *(validation if name in VALIDATED else ())))
        for name, (n, args) in layouts.items()
    ]


def varied_runs(root):
    """Return runs on fine-tuning rows of different lengths; of two in one folder the second resumes the first."""
    folder = root / "varied-data"
    folder.mkdir()
    rows = [{"prompt": f"{i}:", "response": "x = f(y)\n" * (1 + i * 7 % 12)} for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(
        PrepareConfig(
            folder, 128, (str(folder / "rows.jsonl"),), "tests/assets/debug/tokenizer", held_out=0.15, pad_multiple=16
        ),
        report=print,
    )
    data = ["--data.train", str(folder / "train"), "--data.validation", str(folder / "heldout")]
    validation = ["--validation.enable", "--validation.freq", "4", "--validation.local_batch_size", "2"]
    runs = []
    for name, (processes, arguments) in VARIED.items():
        out = "varied-fsdp2-accumulation" if name == "varied-resumed" else name
        steps = "2" if name == "varied-fsdp2-accumulation" else str(VARIED_STEPS)
        common = [*COMMON, *GROUPED, *data, *validation, "--validation.steps", "-1", "--training.steps", steps]
        runs.append((processes, debug(root / out, *common, *arguments)))
    return runs


@pytest.fixture(scope="module")
def results(all_runs):
    return {name: scalars(all_runs / name) for name in LAYOUTS | BFLOAT16 | PACKED}


def pack(folder):
    """Prepare packed shards of this suite's functions, most of them shorter than a row."""
    rows = [
        {"text": text} for path in sorted(ROOT.glob("tests/*/test_*.py")) for text in path.read_text().split("\n\n\n")
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:300])))
    summary = prepare(
        PrepareConfig(
            folder,
            128,
            (str(folder / "rows.jsonl"),),
            "tests/assets/debug/tokenizer",
            pack_documents=True,
            held_out=0.2,
        ),
        report=print,
    )
    assert summary.packing["heldout"].most_documents > 1 < summary.packing["train"].most_documents


def relative_difference(ours, theirs):
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in ours)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_takes_the_same_step(results, layout):
    reference = results["single"]
    assert set(reference["grad_norm"]) == set(range(1, STEPS + 1))
    assert set(reference["validation/loss_memory_on"]) == {0, STEPS}
    for name in TRACKED:
        if name.startswith("validation") and layout not in VALIDATED:
            continue
        ours, theirs = results[layout][name], reference[name]
        assert set(ours) == set(theirs)
        assert relative_difference(ours, theirs) < TOLERANCE, f"{name}: {ours} against {theirs}"


@pytest.mark.parametrize("layout", [name for name in PACKED if name != "packed"])
def test_packed_rows_take_the_same_step(results, layout):
    for name in TRACKED:
        if name.startswith("validation") and layout not in VALIDATED:
            continue
        assert relative_difference(results[layout][name], results["packed"][name]) < TOLERANCE, name
    assert results["packed"]["validation/loss_memory_on"][0] < results["packed"]["validation/loss_memory_off"][0]


@pytest.mark.parametrize("layout", ["varied-tp2", "varied-cp2-accumulation", "varied-fsdp2-accumulation"])
def test_rows_of_different_lengths_take_the_same_steps(all_runs, layout):
    """The last layout is stopped after two steps and resumed on one rank, inside a window of grouped rows."""
    ours, theirs = scalars(all_runs / layout), scalars(all_runs / "varied")
    for name in TRACKED:
        if name.startswith("validation") and "tp2" in layout:
            continue
        steps = {0, VARIED_STEPS} if name.startswith("validation") else set(range(1, VARIED_STEPS + 1))
        extra = {2} if name.startswith("validation") and "fsdp2" in layout else set()
        assert set(ours[name]) - extra == set(theirs[name]) == steps, name
        assert relative_difference(theirs[name], ours[name]) < TOLERANCE, f"{name}: {ours[name]} against {theirs[name]}"
    tokens = [theirs["n_tokens_seen"][step] for step in range(1, VARIED_STEPS + 1)]
    assert len({b - a for a, b in pairwise([0, *tokens])}) > 1, "micro-batches have different lengths"
    assert 0 < max(theirs["data/fill_ratio"].values()) < 0.5


def test_scalars_count_a_context_parallel_group_once(results):
    for name in ("n_tokens_seen", "parametric_memory/hardware_flops_ratio", "loss_metrics/global_max_loss"):
        ours, theirs = results["fsdp2-cp2"][name], results["fsdp2"][name]
        assert relative_difference(ours, theirs) < (0.05 if "flops" in name else TOLERANCE), name
    assert results["fsdp2-cp2"]["n_tokens_seen"] == {step: step * 4 * 128 for step in range(1, STEPS + 1)}


@pytest.mark.slow
def test_inductor_takes_the_same_step(tmp_path):
    """Inductor takes half a minute; the options below compile with another backend."""
    compiled = debug(tmp_path / "compiled", *COMMON, LOCAL, "2", "--compile.enable")
    run_many([(1, debug(tmp_path / "single", *COMMON, LOCAL, "4")), (2, compiled)])
    ours, theirs = scalars(tmp_path / "compiled"), scalars(tmp_path / "single")
    for name in TRACKED[:7]:
        assert relative_difference(ours[name], theirs[name]) < TOLERANCE, name


@pytest.mark.parametrize("layout", BFLOAT16)
def test_mixed_precision_stays_close(results, layout):
    for name in TRACKED[:4]:
        assert relative_difference(results[layout][name], results["single"][name]) < BFLOAT16_TOLERANCE, name


def test_throughput_is_by_plain_training_and_the_memorys_share_is_said(results):
    """Throughput and MFU use torchtitan's model FLOPs, which exclude the inner loop."""
    dim, layers, hidden, vocabulary, length = 32, 2, 64, 512, 128
    parameters = layers * (3 * dim * dim + 3 * dim * hidden + 2 * dim) + dim + dim * vocabulary
    flops = 6 * parameters + 12 * layers * dim * length
    curves = results["single"]
    for step in (1, 2):
        assert curves["tflops"][step] / curves["throughput(tps)"][step] == pytest.approx(flops / 1e12, rel=1e-5)
        # One of two layers is trunk: the pre-anchor adds a pass through it, two inner steps add passes of the tail.
        assert 1.5 < curves["parametric_memory/hardware_flops_ratio"][step] < 2.5


def test_the_layouts_are_not_trivially_equal(results):
    """Memory and training change the losses, so the comparisons above are meaningful."""
    one = results["single"]
    assert one["parametric_memory/fast_weight_norm"][1] > 1e-3
    assert one["validation/loss_memory_on"][0] < one["validation/loss_memory_off"][0]
    assert one["validation/loss_memory_off"][STEPS] < one["validation/loss_memory_off"][0]
    assert set(one["parametric_memory/skipped_updates"].values()) == {0}


# Each option of the inner loop at least once, on the layouts where it runs different code.
MEMORY = "--parametric_memory."
OPTIONS = {
    "kl-progressive-global": {"inner_loss": "kl", "trajectory": "progressive", "gradient_norm": "global"},
    "reverse_kl-newly_revealed-3": {
        "inner_loss": "reverse_kl", "supervision": "newly_revealed", "inner_steps": "3",
        "target_modules": "ffn,attention",
    },
    "hidden_mse-anchor_only-full": {
        "inner_loss": "hidden_mse", "trajectory": "anchor_only", "adapter": "full", "target_modules": "ffn,attention",
    },
    "hidden_cosine-pre_anchor_only": {
        "inner_loss": "hidden_cosine", "trajectory": "pre_anchor_only", "student_hidden": "post_final_norm",
        "inner_steps": "1", "target_modules": "q,o",
    },
    "batch": {"granularity": "batch", "adapter": "full", "target_modules": "ffn,attention"},
    # Of two ranks only the second has samples that train with the memory.
    "pairs-half": {"samples_per_set": "2", "probability": "0.5", "target_modules": "ffn,attention"},
}  # fmt: skip
OPTION_LAYOUTS = {
    "single": LAYOUTS["single"],
    # Every block is recomputed in the backward pass, and every FSDP group reshards after its forward pass.
    "fsdp2": (2, [LOCAL, "2", AC, "full", "--parallelism.fsdp_reshard_after_forward", "always"]),
    "tp2": LAYOUTS["tp2"],
    "tp2-no-loss-parallel": (2, [LOCAL, "4", TP, "2", "--parallelism.disable_loss_parallel"]),
    "compiled": (2, [LOCAL, "2", "--compile.enable", "--compile.backend", "aot_eager"]),
}
# One set per local batch depends on the local batch, so only layouts with equal local batches are comparable.
# Compilation takes seconds; the two option sets that stay compiled cover everything that a compiled block sees.
LEFT_OUT = {
    "batch": ("fsdp2", "compiled"),
    "kl-progressive-global": ("compiled",),
    "reverse_kl-newly_revealed-3": ("compiled",),
    "pairs-half": ("tp2-no-loss-parallel", "compiled"),
}
OPTION_RUNS = [
    (options, layout) for options in OPTIONS for layout in OPTION_LAYOUTS if layout not in LEFT_OUT.get(options, ())
]


# Covers every option set and every layout; the other pairs are slow, and test_sharded_step.py covers them below the
# trainer.
SOME_RUNS = (
    ("kl-progressive-global", "tp2-no-loss-parallel"),
    ("reverse_kl-newly_revealed-3", "fsdp2"),
    ("hidden_mse-anchor_only-full", "tp2"),
    ("hidden_mse-anchor_only-full", "compiled"),
    ("hidden_cosine-pre_anchor_only", "tp2-no-loss-parallel"),
    ("batch", "tp2"),
    ("pairs-half", "fsdp2"),
)


SINGLE_RUNS = tuple((name, "single") for name in OPTIONS)


def option_runs(root, chosen_runs):
    runs = []
    for name, layout in chosen_runs:
        processes, arguments = OPTION_LAYOUTS[layout]
        chosen = [argument for key, value in OPTIONS[name].items() for argument in (MEMORY + key, value)]
        runs.append((processes, debug(root / "options" / name / layout, *COMMON, *arguments, *chosen)))
    return runs


@pytest.fixture(scope="module")
def options(all_runs):
    return {run: scalars(all_runs / "options" / run[0] / run[1]) for run in SINGLE_RUNS + SOME_RUNS}


@pytest.fixture(scope="module")
def more_options(tmp_path_factory):
    root, more = tmp_path_factory.mktemp("more"), [run for run in OPTION_RUNS if run not in SINGLE_RUNS + SOME_RUNS]
    run_many(option_runs(root, more))
    return {run: scalars(root / "options" / run[0] / run[1]) for run in more}


@pytest.mark.parametrize(
    "name, layout",
    [
        pytest.param(*run, marks=() if run in SOME_RUNS else pytest.mark.slow)
        for run in OPTION_RUNS
        if run[1] != "single"
    ],
)
def test_every_option_is_the_same_on_every_layout(request, options, name, layout):
    results = options if (name, layout) in SOME_RUNS else request.getfixturevalue("more_options")
    ours, theirs = results[name, layout], options[name, "single"]
    tracked = [key for key in theirs if key.startswith("parametric_memory/inner")]
    steps = {"kl-progressive-global": 2, "reverse_kl-newly_revealed-3": 3, "batch": 2, "pairs-half": 2}.get(name, 1)
    assert len(tracked) == 2 * steps
    tracked += [key for key in theirs if "anchor_nll" in key]
    assert len(tracked) == 2 * steps + (3 if name in ("batch", "pairs-half") else 2)
    others = "fast_weight_norm", "relative_write"
    for key in (*tracked, "loss_metrics/global_avg_loss", "grad_norm", *(f"parametric_memory/{x}" for x in others)):
        assert set(ours[key]) == set(theirs[key]) == {1, 2}
        assert relative_difference(ours[key], theirs[key]) < TOLERANCE, f"{key}: {ours[key]} against {theirs[key]}"


# Expert-parallel ranks may share one set of fast weights, like a single process with all their rows.
EXPERTS = {"memory-of-a-sample": [], "memory-of-a-batch": [MEMORY + "granularity", "batch"]}
EXPERT_LAYOUTS = {
    "single": (1, [LOCAL, "4"]),
    "ep2": (2, [LOCAL, "2", "--parallelism.expert_parallel_degree", "2", DETERMINISTIC]),
}


def expert_runs(root):
    backbone = ["--model.name", "llada_moe", "--model.flavor", "debug", "--training.steps", str(STEPS)]
    return [
        (n, debug(root / "experts" / name / layout, *backbone, *memory, *arguments))
        for name, memory in EXPERTS.items()
        for layout, (n, arguments) in EXPERT_LAYOUTS.items()
    ]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_take_the_same_steps_from_scratch(all_runs, name):
    ours, theirs = (scalars(all_runs / "experts" / name / layout) for layout in ("ep2", "single"))
    tracked = [key for key in theirs if key.startswith("parametric_memory/inner")]
    assert tracked
    for key in ("loss_metrics/global_avg_loss", "grad_norm", *tracked):
        assert set(ours[key]) == set(theirs[key]) == set(range(1, STEPS + 1))
        assert relative_difference(ours[key], theirs[key]) < TOLERANCE, f"{key}: {ours[key]} against {theirs[key]}"


def continued_runs(root):
    """Return runs in one folder with memory on, off and on again, and in another with memory off, then on."""
    save = ["--checkpoint.enable", "--checkpoint.interval", "3", LOCAL, "2"]
    off = ["--parametric_memory.no_enable"]
    runs = [
        debug(root / "on", *save, "--training.steps", "3"),
        debug(root / "on", *save, "--training.steps", "4", *off),
        debug(root / "on", *save, "--training.steps", "5"),
        debug(root / "off", *save, *off, "--training.steps", "3"),
        debug(root / "off", *save, "--training.steps", "4"),
    ]
    return [(2, run) for run in runs]


@pytest.fixture(scope="module")
def continued(all_runs):
    return all_runs


def test_memory_can_be_switched_between_runs(continued):
    on, off = scalars(continued / "on"), scalars(continued / "off")
    assert set(on["loss_metrics/global_avg_loss"]) == {1, 2, 3, 4, 5}
    assert set(on["parametric_memory/inner_loss_step_1"]) == {1, 2, 3, 5}
    assert set(off["parametric_memory/inner_loss_step_1"]) == {4}


@pytest.mark.slow
def test_compiled_blocks_take_every_pass(tmp_path):
    """Passes with and without gradient, students and teachers, two batch sizes exceed torch's default graph limit."""
    compiled = debug(
        tmp_path, "--compile.enable", "--compile.backend", "aot_eager", AC, "full", LOCAL, "2",
        MEMORY + "inner_loss", "kl", MEMORY + "layer_fraction", "0.5", MEMORY + "start_step", "2", "--training.steps",
        "3", "--validation.enable", "--validation.local_batch_size", "3", "--validation.steps", "1",
    )  # fmt: skip
    run_many([(1, compiled)])
    curves = scalars(tmp_path)
    assert set(curves["loss_metrics/global_avg_loss"]) == {1, 2, 3}
    assert set(curves["parametric_memory/inner_loss_step_1"]) == {2, 3}
    assert set(curves["validation/loss_memory_on"]) == {0, 3}


def test_fast_weights_are_never_saved(continued):
    with_memory, without = (
        set(FileSystemReader(continued / name / "checkpoint/step-3").read_metadata().state_dict_metadata)
        for name in ("on", "off")
    )
    assert with_memory == without


def test_as_a_user_starts_it(tmp_path):
    """launch/train.sh on two processes with every feature on: console, TensorBoard, files."""
    out = launch(
        2, tmp_path, "--training.steps", "4",
        "--checkpoint.enable", "--validation.enable", "--validation.freq", "2", "--validation.steps", "1",
        "--metrics.log_freq", "2",
    )  # fmt: skip
    step_lines = [line for line in out.splitlines() if " step:  " in line]
    assert len(step_lines) == 3, "one line per logged step, from rank 0 only"  # steps 1, 2 and 4
    number = r"\d+\.\d{4}"
    line_end = rf"  inner loss: {number} -> {number}  anchor nll: {number} -> {number} -> {number}  write: \d+\.\d\d%$"
    assert all(re.search(line_end, line) for line in step_lines), step_lines[0]
    assert "held-out loss" in out and "start (step      0)" in out and "end   (step      4)" in out
    curves = scalars(tmp_path)
    assert {*TRACKED, "parametric_memory/hardware_flops_ratio", "mfu(%)"} <= set(curves)
    assert set(curves["parametric_memory/inner_loss_step_1"]) == {1, 2, 4}
    assert set(curves["validation/loss_memory_off"]) == {0, 2, 4}
    history = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [0, 2, 4]
    assert (tmp_path / "checkpoint/step-4/.metadata").is_file()

    same = ["--training.steps", "4", "--training.global_batch_size", "8", "--checkpoint.enable", "--validation.enable"]
    (output,) = run_many([(1, debug(tmp_path, *same))])
    assert "This run is complete: its checkpoint is at step 4" in output and " step:  " not in output
