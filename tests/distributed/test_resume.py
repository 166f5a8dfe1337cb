"""A run in two parts is the run in one: exactly on one layout, to rounding on others; if it is the same run."""

import json
import re
import shutil
from pathlib import Path

import pytest

from memdlm_dist.checkpoint.catalogue import read_run
from memdlm_dist.checkpoint.continuity import IDENTITY_KEYS, check, check_format
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.storage import Storage
from tests.support.launching import debug, run_many, scalars

LOCAL, GLOBAL = "--training.local_batch_size", "--training.global_batch_size"
TP, CP = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
# 41 sequences: with 6 in a batch 6 steps an epoch, with 4 10 steps, and some sequences over.
SMALL = ["--data.train", "tests/assets/debug/heldout", "--model.flavor", "tiny", "--lr_scheduler.total_steps", "20"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval"]
WORKERS = ["--training.dataloader.num_workers", "2", "--training.dataloader.prefetch_factor", "2"]
CURVES = ("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm", "n_tokens_seen")


def load(checkpoint: Path) -> list[str]:
    """Arguments that continue another run's checkpoint."""
    return ["--checkpoint.initial_load_path", str(checkpoint), "--checkpoint.no_initial_load_model_only"]


def draws(folder: Path) -> dict[tuple, str]:
    """(kind, step, sample) -> digest, of all ranks; ranks that draw the same must agree."""
    found: dict[tuple, str] = {}
    for file in sorted(folder.iterdir()):
        for kind, step, sample, digest in map(json.loads, file.read_text().splitlines()):
            assert found.setdefault((kind, step, sample), digest) == digest
    return found


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """The files of weights, optimizer, schedule and position: torch writes equal states as equal bytes."""
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}


# Exactly


def exact_runs(root: Path) -> list:
    """20 steps at a stretch; and in halves, saved in the background. Both with loader workers."""
    runs = []
    for name, steps, mode in (("straight", "20", "disabled"), ("halves", "10", "async"), ("halves", "20", "async")):
        arguments = [*SMALL, *SAVE, "5", "--checkpoint.async_mode", mode, *WORKERS, LOCAL, "3"]
        run = debug(root / name, *arguments, "--training.steps", steps)
        runs.append((2, run, {"record": str(root / name / "draws")}))
    return runs


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All runs of this file for one start of Python: a folder for each part, and what each run of the last printed."""
    root = tmp_path_factory.mktemp("resume")
    exact, elastic = exact_runs(root / "exact"), elastic_runs(root / "elastic")
    changed = changed_runs(root / "changed")
    outputs = run_many([*exact, *elastic, *changed.values()])
    return root, dict(zip(changed, outputs[-len(changed) :], strict=True))


@pytest.fixture
def exact(done):
    return done[0] / "exact"


@pytest.fixture
def elastic(done):
    return done[0] / "elastic"


@pytest.fixture
def changed(done):
    return done[0] / "changed", done[1]


def test_two_halves_are_the_whole_to_the_last_bit(exact):
    straight, halves = exact / "straight", exact / "halves"
    for name in (*CURVES, "parametric_memory/inner_loss_step_2", "parametric_memory/fast_weight_norm"):
        assert scalars(halves)[name] == scalars(straight)[name] and set(scalars(straight)[name]) == set(range(1, 21))
    for step in (5, 10, 15, 20):
        whole, parts = (tensors(run / f"checkpoint/step-{step}") for run in (straight, halves))
        assert len(whole) == 2 and whole == parts
    whole = draws(straight / "draws")
    assert whole == draws(halves / "draws") and len(whole) == 3 * 20 * 6
    # 36 of 41 in each epoch of 6 steps, none twice, in another order each time.
    epochs = [[s for kind, step, s in whole if kind == "level" and 6 * e < step <= 6 * e + 6] for e in range(3)]
    assert all(len(set(epoch)) == 36 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3


# On other layouts

LAYOUTS = {
    "single": (1, [LOCAL, "4"]),
    "accumulation": (1, [LOCAL, "1", *WORKERS]),
    "cp2": (2, [LOCAL, "4", CP, "2"]),
    "fsdp2-tp2": (4, [LOCAL, "1", TP, "2"]),
    "fsdp2-cp2": (4, [LOCAL, "1", CP, "2", *WORKERS]),
}
# Float32 rounding in another order; 12 steps amplify 1e-7 to some 1e-6.
TOLERANCE = 1e-4


def elastic_runs(root: Path) -> list:
    """12 steps on FSDP 2, and steps 8 to 12 of it on each layout; the epoch ends at step 10."""
    common = [*SMALL, *SAVE, "7", GLOBAL, "4", "--training.steps", "12"]
    straight = debug(root / "straight", *common, LOCAL, "2")
    runs = [(2, straight, {"record": str(root / "straight/draws")})]
    saved = [*load(root / "straight/checkpoint/step-7"), "--checkpoint.load_only"]
    for name, (processes, layout) in LAYOUTS.items():
        out = root / name
        runs.append((processes, debug(out, *common, *saved, *layout), {"record": str(out / "draws")}))
    return runs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_continues_on_another_layout(elastic, layout):
    straight, moved = scalars(elastic / "straight"), scalars(elastic / layout)
    for name in CURVES:
        assert set(moved[name]) == set(range(8, 13))
        if name == "loss_metrics/global_max_loss":
            continue  # of a rank, so it depends on which samples are together on one
        for step, value in moved[name].items():
            assert value == pytest.approx(straight[name][step], rel=TOLERANCE), f"{name} at step {step}"
    expected = {key: digest for key, digest in draws(elastic / "straight/draws").items() if key[1] > 7}
    assert draws(elastic / layout / "draws") == expected and len(expected) == 3 * 5 * 4


# The same run only

# What the first release wrote: a TOML file, and a checkpoint of a run of it on two ranks (see docs/changes.md).
RELEASED = Path("tests/assets/released")


def another_tokenizer(root: Path) -> Path:
    """A tokenizer of the same size, in which two tokens have changed places."""
    folder = shutil.copytree("tests/assets/debug/tokenizer", root / "another")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def changed_runs(root: Path) -> dict:
    """Continuing a run with something changed: refused; then accepted, and then with the change undone."""
    out = root / "run"
    common = [*SMALL, *SAVE, "3", LOCAL, "2"]
    change = [GLOBAL, "8", "--data.shuffle_seed", "5", "--data.train", "tests/assets/debug/train"]
    accept = "--checkpoint.accept_changes"
    released = debug(root / "released", *SMALL, LOCAL, "4", "--training.steps", "4", "--lr_scheduler.total_steps", "6",
                     "--checkpoint.enable", *load(RELEASED / "checkpoint/step-2"))  # fmt: skip
    runs = {
        "made": debug(out, *common, GLOBAL, "4", "--training.steps", "3"),
        "refused": debug(out, *common, *change, "--training.steps", "6"),
        "partly": debug(out, *common, *change, "--training.steps", "6", accept, "training.global_batch_size"),
        "batch": debug(root / "batch", *common, GLOBAL, "8", "--training.steps", "6", accept,
                       "training.global_batch_size", *load(out / "checkpoint/step-3")),
        "tokenizer": debug(root / "tokenizer", *common, GLOBAL, "4", "--training.steps", "6",
                           *load(out / "checkpoint/step-3"), "--model.hf_assets_path", str(another_tokenizer(root))),
        "experiment": debug(root / "experiment", *common, GLOBAL, "4", "--training.steps", "4",
                            *load(out / "checkpoint/step-3"), "--optimizer.lr=5", "--optimizer.name=Adam",
                            "--parametric_memory.no_enable", "--lr_scheduler.decay_type=cosine"),
        "released": ["--job.config_file", str(RELEASED / "debug.toml"), *released[2:]],
        "data": debug(out, *common, *change, "--training.steps", "6", accept,
                      "training.global_batch_size,data.shuffle_seed,data.train"),
    }  # fmt: skip
    status = {"refused": 2, "partly": 2, "tokenizer": 2}
    return {
        name: (1, arguments, {"status": status.get(name, 0), "record": str(root / f"draws-{name}")})
        for name, arguments in runs.items()
    }


def test_another_run_is_not_continued_unasked(changed):
    root, outputs = changed
    fingerprint = json.loads((root / "run/checkpoint/step-3/run.json").read_text())["identity"]["data.train"]
    for part in (
        "step-3 was made with training.global_batch_size = 4 (now 8), ",
        f"data.train fingerprint = {fingerprint} (now ", "data.shuffle_seed = 9176 (now 5), so ",
        "undo the change, or accept it with --checkpoint.accept_changes "
        "training.global_batch_size,data.train,data.shuffle_seed.",
    ):  # fmt: skip
        assert part in outputs["refused"]
    assert "accept_changes data.train,data.shuffle_seed." in outputs["partly"], "what was accepted is not asked again"
    assert "Traceback" not in outputs["refused"] + outputs["partly"]


def test_another_tokenizer_is_refused(changed):
    _, outputs = changed
    assert re.search(
        r"step-3 was made with model.hf_assets_path fingerprint = \w{16} \(now \w{16}\), so .* or accept it with "
        r"--checkpoint.accept_changes model.hf_assets_path\.",
        outputs["tokenizer"],
    )


def test_another_experiment_is_said(changed):
    root, outputs = changed
    assert (
        "step-3 was made with optimizer.name = AdamW (now Adam), optimizer.lr = 0.001 (now 5.0), "
        "lr_scheduler.decay_type = linear (now cosine), parametric_memory.enable = True (now False); the run goes on "
        "with the change."
    ) in outputs["experiment"]
    assert outputs["experiment"].count("WARNING") - outputs["made"].count("WARNING") == 1
    for other in ("batch", "data"):
        assert "the run goes on with the change" not in outputs[other]
    run = json.loads((root / "run/checkpoint/step-3/run.json").read_text())
    assert run["format"] == 1 and run["experiment"]["parametric_memory.rank"] == 8


def test_the_first_releases_checkpoint_goes_on(changed):
    """On another number of ranks; the losses are those that the release printed."""
    found = scalars(changed[0] / "released")["loss_metrics/global_avg_loss"]
    assert found == pytest.approx({3: 6.297245979309082, 4: 6.666538715362549}, rel=1e-5)


def test_a_damaged_or_later_run_file(tmp_path):
    ours = dict.fromkeys(IDENTITY_KEYS, 1)
    with pytest.raises(UserError, match=r"run/step-3 has format 9, and this version reads up to 1; use the version"):
        check_format("run/step-3", {"format": 9})
    with pytest.raises(UserError, match=r"run/step-3/run.json is damaged \(its format is 'x'\); restore the file"):
        check_format("run/step-3", {"format": "x"})
    for damaged in ({"identity": [1]}, {"identity": {"debug.seed": 1}, "experiment": "x"}):
        with pytest.raises(
            UserError, match=r"run.json is damaged \((identity is list|experiment is str), not an object"
        ):
            check("run/step-3", damaged, ours, {}, [])
    for content, says in (("{", "Expecting property name"), ("[1]", "it is a list, not an object")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(
            UserError, match=rf"run.json is damaged \({says}.*\); restore the file, or remove it to go on"
        ):
            read_run(Storage(str(tmp_path)))
    with pytest.raises(UserError, match=r"debug.seed = \[7\] \(now 1\)"):
        check("run/step-3", {"identity": {"debug.seed": [7]}}, ours, {}, [])


def test_an_accepted_batch_size_goes_on_in_the_data(changed):
    root, _ = changed
    before = {s for kind, _, s in draws(root / "draws-made") if kind == "level"}
    after = {s for kind, _, s in draws(root / "draws-batch") if kind == "level"}
    assert len(before) == 12 and len(after) == 24 and not before & after, "one epoch of 41, no sample twice"


def test_accepted_data_are_read_from_the_beginning_of_an_epoch(changed):
    root, outputs = changed
    assert "Accepted: the checkpoint was made with data.train fingerprint =" in outputs["data"]
    found = scalars(root / "run")["loss_metrics/global_avg_loss"]
    assert set(found) == set(range(1, 7))
    assert len({s for kind, _, s in draws(root / "draws-data") if kind == "level"}) == 24
