"""Needle tasks during training (`validation.tasks`)."""

import re
from pathlib import Path

import pytest

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import NeedleGenerator, Sizes
from memdlm_dist.evaluation.retrieval import evaluate
from memdlm_dist.evaluation.task_validator import TaskSettings, read_sizes, scalars
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED
from memdlm_dist.inference.trained_model import TrainedModel
from tests.support import launching

TASKS = ["facts_1", "repeat"]
TRAINING = [
    "--model.flavor", "tiny", "--parametric_memory.layer_fraction", "0.5", "--parametric_memory.learning_rate", "50",
    "--training.steps", "3", "--training.global_batch_size", "4", "--checkpoint.enable", "--checkpoint.interval", "2",
    "--validation.enable", "--validation.steps", "1", "--validation.local_batch_size", "2",
]  # fmt: skip
COMMON = [
    *TRAINING,
    "--validation.tasks", ",".join(TASKS), "--validation.tasks_sizes", "facts=2,words=2",
    "--validation.tasks_freq", "2", "--validation.tasks_samples", "3", "--validation.tasks_new_tokens", "4",
]  # fmt: skip
ALL_ROWS, HALF = (["--training.local_batch_size", size] for size in ("4", "2"))
TP, EP = (f"--parallelism.{kind}_parallel_degree" for kind in ("tensor", "expert"))
RUNS = {
    "one": (1, ALL_ROWS),
    "fsdp2": (2, HALF),
    "tp2": (2, [*ALL_ROWS, TP, "2"]),
    "ep2": (2, [*HALF, "--model.name", "llada_moe", "--model.flavor", "debug", EP, "2"]),
    "memory off": (1, [*ALL_ROWS, "--parametric_memory.no_enable"]),
    "asked to stop": (
        2,
        [*HALF, "--training.steps", "6"],
        {"status": 75, "faults": [{"do": "SIGTERM", "at": "answer", "step": 2, "rank": 1}]},
    ),
    "without tasks": (1, ALL_ROWS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of the runs, and their outputs and scalars of the tasks by name."""
    root = tmp_path_factory.mktemp("tasks")
    outputs = launching.run_many(
        (processes, launching.debug(root / name, *(COMMON if name != "without tasks" else TRAINING), *arguments), *rest)
        for name, (processes, arguments, *rest) in RUNS.items()
    )
    curves = {name: launching.scalars(root / name) for name in RUNS}
    tasks = {
        name: {tag: values for tag, values in curve.items() if tag.startswith("tasks/")}
        for name, curve in curves.items()
    }
    return root, dict(zip(RUNS, outputs, strict=True)), tasks


def test_training_does_not_depend_on_the_tasks(runs):
    root, _, _ = runs
    one, plain = (launching.scalars(root / name) for name in ("one", "without tasks"))
    losses = [tag for tag in plain if "loss" in tag or "nll" in tag or "norm" in tag]
    assert len(losses) > 4 and not [tag for tag in plain if tag.startswith("tasks/")]
    assert all(one[tag] == plain[tag] for tag in losses), "bit for bit"


def test_a_stop_request_ends_the_tasks(runs):
    root, outputs, tasks = runs
    output = outputs["asked to stop"]
    assert output.count("The tasks of step 2 are left out, because a stop was requested.") == 2
    assert "Stopped after step 3, saved in " in output and (root / "asked to stop/checkpoint/step-3").is_dir()
    assert tasks["asked to stop"] and all([*values] == [0] for values in tasks["asked to stop"].values())


def test_the_scores_are_those_of_the_checkpoint(runs):
    root, outputs, tasks = runs
    arguments = launching.debug(root / "one", *COMMON, *RUNS["one"][1])
    for step in (2, 3):
        with TrainedModel(parse_config.parse(arguments), str(root / f"one/checkpoint/step-{step}")) as model:
            hay = Haystack.read("heldout")
            needles = NeedleGenerator(model.tokenizer, hay, "heldout", Sizes(facts=2, words=2), 0)
            scores, _ = evaluate(
                model, needles, TASKS, [124], 3, {"off": None, "on": AS_PUBLISHED}, Decoding(4), 4, batch_size=2
            )
        for tag, value in scalars(scores).items():
            if "seconds" not in tag:
                # Compared through float32 of TensorBoard.
                assert tasks["one"][tag][step] == pytest.approx(value, rel=1e-5), tag
    nll = {memory: tasks["one"][f"tasks/repeat_124/answer_nll_memory_{memory}"][3] for memory in ("off", "on")}
    assert abs(nll["off"] - nll["on"]) > 1e-3, "the memory is read"
    assert re.search(r"tasks step: 2  facts_1 124: off \S+% on \S+%  repeat 124: off \S+% on \S+%\n", outputs["one"])


def check(tasks, expected):
    """Compare the scalars of a run with those of one process."""
    assert tasks.keys() == expected.keys()
    for tag, values in expected.items():
        assert sorted(values) == [0, 2, 3], "before training, every second step, and after the last one"
        if "seconds" not in tag:
            # The weights differ by rounding after three steps; the memory changes the loss by 1e-3 and more.
            assert tasks[tag] == pytest.approx(values, rel=2e-5), tag
        else:
            assert all(seconds > 0 for seconds in values.values())


@pytest.mark.parametrize("name", ["fsdp2", "tp2"])
def test_layouts_agree(runs, name):
    _, _, tasks = runs
    assert {tag.rsplit("/", 1)[0] for tag in tasks["one"]} == {"tasks", "tasks/facts_1_124", "tasks/repeat_124"}
    check(tasks[name], tasks["one"])


@pytest.mark.slow
def test_compiled_blocks_give_the_same_scores(runs, tmp_path):
    compiled = ["--compile.enable", "--compile.backend", "eager"]
    launching.run_many([(1, launching.debug(tmp_path, *COMMON, *ALL_ROWS, *compiled))])
    tasks = {tag: values for tag, values in launching.scalars(tmp_path).items() if tag.startswith("tasks/")}
    check(tasks, runs[2]["one"])


def test_without_fast_weights_per_prompt_the_memory_stays_off(runs):
    _, outputs, tasks = runs
    for name in ("ep2", "memory off"):
        assert tasks[name] and not [tag for tag in tasks[name] if tag.endswith("_on")]
    assert "validation.tasks are answered without memory, because expert parallelism" in outputs["ep2"]
    assert "without memory" not in outputs["memory off"]


def test_ring_attention_is_refused():
    ring = ["--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_method", "ring"]
    config = parse_config.parse(launching.debug(Path("unused"), *COMMON, *ring))
    with pytest.raises(
        UserError, match=r"pads prompts, which context_parallel_method = 'ring' cannot; choose 'ulysses'"
    ):
        TaskSettings.read(config)


def test_sizes_are_read_by_name():
    assert read_sizes([]) == Sizes() and read_sizes(["facts=2", "distractors=0"]) == Sizes(facts=2, distractors=0)
    with pytest.raises(UserError, match=r"validation\.tasks_sizes has facts twice; remove one"):
        read_sizes(["facts=2", "facts=3"])
    for text in ("facts", "facts=", "facts=-1", "fakts=2", "facts=2.5", "facts=" + "9" * 5000):
        with pytest.raises(
            UserError, match=f"validation.tasks_sizes has '{text}', which is not NAME=NUMBER; the names"
        ):
            read_sizes([text])
    for text, limits in (("facts=0", "1 to 1,000,000, but is 0"), ("digits=101", "1 to 100, but is 101")):
        with pytest.raises(UserError, match=rf"The size \w+ of the needle tasks must be from {limits}\.$"):
            read_sizes([text])
