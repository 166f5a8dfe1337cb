"""Resuming: bit for bit on the same layout, to rounding on others, and refused for a different run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from memdlm_dist.checkpoint.catalogue import read_run
from memdlm_dist.checkpoint.continuity import IDENTITY_KEYS, check, check_format
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.storage import Storage
from tests.support.launching import debug, run_many, scalars
from tests.support.published import contents
from tools import convert_checkpoint

LOCAL, GLOBAL = "--training.local_batch_size", "--training.global_batch_size"
TP, CP = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
# 41 sequences: 6 steps an epoch with 6 a batch, 10 steps with 4; the rest is dropped.
SMALL = ["--data.train", "tests/assets/debug/heldout", "--model.flavor", "tiny", "--lr_scheduler.total_steps", "20"]
SAVE = ["--checkpoint.enable", "--checkpoint.interval"]
WORKERS = ["--training.dataloader.num_workers", "2", "--training.dataloader.prefetch_factor", "2"]
CURVES = ("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm", "n_tokens_seen")


def load(checkpoint: Path) -> list[str]:
    """Return the arguments that continue another run's checkpoint."""
    return ["--checkpoint.initial_load_path", str(checkpoint), "--checkpoint.no_initial_load_model_only"]


def draws(folder: Path) -> dict[tuple, str]:
    """Return {(kind, step, sample): digest} over all ranks; assert that ranks with the same key agree."""
    digests: dict[tuple, str] = {}
    for file in sorted(folder.iterdir()):
        for kind, step, sample, digest in map(json.loads, file.read_text().splitlines()):
            assert digests.setdefault((kind, step, sample), digest) == digest
    return digests


def pairs_runs(root: Path) -> list:
    """Return runs with sets for two samples: 4 steps on two ranks, and 2 steps on two ranks that one rank continues."""
    runs = []
    for name, processes, local, steps in (("straight", 2, "2", "4"), ("halves", 2, "2", "2"), ("halves", 1, "4", "4")):
        arguments = [*SMALL, *SAVE, "2", GLOBAL, "4", LOCAL, local, "--parametric_memory.samples_per_set", "2"]
        run = debug(root / name, *arguments, "--training.steps", steps)
        runs.append((processes, run, {"record": str(root / name / "draws")}))
    return runs


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return a checkpoint's files by name; torch writes equal states as equal bytes."""
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}


# Bit for bit


def exact_runs(root: Path) -> list:
    """Return runs of 20 steps at once, and in two halves with asynchronous saves; both with loader workers."""
    runs = []
    for name, steps, mode in (("straight", "20", "disabled"), ("halves", "10", "async"), ("halves", "20", "async")):
        arguments = [*SMALL, *SAVE, "5", "--checkpoint.async_mode", mode, *WORKERS, LOCAL, "3"]
        run = debug(root / name, *arguments, "--training.steps", steps)
        runs.append((2, run, {"record": str(root / name / "draws")}))
    return runs


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """Return the folder of all runs and the outputs of `changed_runs`; one launch of Python serves all runs."""
    root = tmp_path_factory.mktemp("resume")
    exact, elastic = exact_runs(root / "exact"), elastic_runs(root / "elastic")
    pairs, changed = pairs_runs(root / "pairs"), changed_runs(root / "changed")
    outputs = run_many([*exact, *elastic, *pairs, *changed.values()])
    return root, dict(zip(changed, outputs[-len(changed) :], strict=True))


@pytest.fixture
def exact(all_runs):
    return all_runs[0] / "exact"


@pytest.fixture
def elastic(all_runs):
    return all_runs[0] / "elastic"


@pytest.fixture
def changed(all_runs):
    return all_runs[0] / "changed", all_runs[1]


def test_two_halves_are_the_whole_to_the_last_bit(exact):
    straight, halves = exact / "straight", exact / "halves"
    for name in (*CURVES, "parametric_memory/inner_loss_step_2", "parametric_memory/fast_weight_norm"):
        assert scalars(halves)[name] == scalars(straight)[name] and set(scalars(straight)[name]) == set(range(1, 21))
    for step in (5, 10, 15, 20):
        expected, resumed = (tensors(run / f"checkpoint/step-{step}") for run in (straight, halves))
        assert len(expected) == 2 and expected == resumed
    expected = draws(straight / "draws")
    assert expected == draws(halves / "draws") and len(expected) == 3 * 20 * 6
    # An epoch of 6 steps reads 36 of 41 samples, none twice, in a new order.
    epochs = [[s for kind, step, s in expected if kind == "level" and 6 * e < step <= 6 * e + 6] for e in range(3)]
    assert all(len(set(epoch)) == 36 for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 3


# On other layouts

LAYOUTS = {
    "single": (1, [LOCAL, "4"]),
    "accumulation": (1, [LOCAL, "1", *WORKERS]),
    "cp2": (2, [LOCAL, "4", CP, "2"]),
    "fsdp2-tp2": (4, [LOCAL, "1", TP, "2", "--checkpoint.no_load_only", "--checkpoint.save_in_hf"]),
    "fsdp2-cp2": (4, [LOCAL, "1", CP, "2", *WORKERS]),
}
# Summation order: 12 steps amplify float32 rounding of 1e-7 to about 1e-6.
TOLERANCE = 1e-4


def elastic_runs(root: Path) -> list:
    """Return 12 steps on FSDP 2, and steps 8 to 12 of that run on each layout; the epoch ends at step 10."""
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
            continue  # depends on which samples share a rank
        for step, value in moved[name].items():
            assert value == pytest.approx(straight[name][step], rel=TOLERANCE), f"{name} at step {step}"
    expected = {key: digest for key, digest in draws(elastic / "straight/draws").items() if key[1] > 7}
    assert draws(elastic / layout / "draws") == expected and len(expected) == 3 * 5 * 4


def test_samples_share_a_set_on_another_number_of_ranks(all_runs):
    """The same samples share a set of fast weights on two ranks and, from step 3, on one."""
    straight, halves = (all_runs[0] / "pairs" / name for name in ("straight", "halves"))
    for name in ("loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/anchor_nll_after"):
        ours, theirs = scalars(halves)[name], scalars(straight)[name]
        assert ours == pytest.approx(theirs, rel=TOLERANCE) and set(ours) == set(range(1, 5)), name
    expected = draws(straight / "draws")
    assert draws(halves / "draws") == expected
    # Noise levels and states of 4 samples a step, initial fast weights of 2 sets.
    assert len(expected) == 4 * (4 + 4 + 2)


def test_an_export_of_a_sharded_model_is_its_checkpoint_converted(elastic):
    """FSDP 2 x TP 2."""
    checkpoint, out = elastic / "fsdp2-tp2/checkpoint/step-12", elastic / "converted"
    export = ["to-hf", "train_configs/debug.toml", "--checkpoint", str(checkpoint), "--output", str(out)]
    assert convert_checkpoint.main([*export, "--model.flavor", "tiny"]) == 0
    theirs, ours = contents(out), contents(checkpoint / "hf")
    assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[key]) for key, x in theirs.items())


# Only the same run

# TOML file and checkpoint of a two-rank run, written by the first release (see docs/changes.md).
RELEASED = Path("tests/assets/released")


def another_tokenizer(root: Path) -> Path:
    """Copy the debug tokenizer with two token ids swapped; return the folder."""
    folder = shutil.copytree("tests/assets/debug/tokenizer", root / "another")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def changed_runs(root: Path) -> dict:
    """Return runs that continue a run with changed settings: refused, partly accepted and accepted."""
    out = root / "run"
    common = [*SMALL, *SAVE, "3", LOCAL, "2"]
    change = [GLOBAL, "8", "--data.shuffle_seed", "5", "--data.train", "tests/assets/debug/train"]
    accept = "--checkpoint.accept_changes"
    released = debug(root / "released", *SMALL, LOCAL, "4", "--training.steps", "4", "--lr_scheduler.total_steps", "6",
                     "--checkpoint.enable", *load(RELEASED / "checkpoint/step-2"))  # fmt: skip
    runs = {
        # In epochs of 10 and of 5 steps.
        "made": debug(out, *common, GLOBAL, "4", "--training.epochs", "0.3"),
        "refused": debug(out, *common, *change, "--training.steps", "6"),
        "partly": debug(out, *common, *change, "--training.steps", "6", accept, "training.global_batch_size"),
        "batch": debug(root / "batch", *common, GLOBAL, "8", "--training.epochs", "1.2", accept,
                       "training.global_batch_size", *load(out / "checkpoint/step-3"),
                       "--lr_scheduler.warmup_ratio", "0.1"),
        "tokenizer": debug(root / "tokenizer", *common, GLOBAL, "4", "--training.steps", "6",
                           *load(out / "checkpoint/step-3"), "--model.hf_assets_path", str(another_tokenizer(root))),
        "experiment": debug(root / "experiment", *common, GLOBAL, "4", "--training.steps", "4",
                            *load(out / "checkpoint/step-3"), "--optimizer.lr=5", "--optimizer.name=Adam",
                            "--parametric_memory.no_enable", "--lr_scheduler.decay_type=cosine",
                            "--diffusion.loss_norm=sequence", "--data.mask_prompt"),
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
    for clause in (
        "step-3 was made with training.global_batch_size = 4 (now 8), ",
        f"data.train fingerprint = {fingerprint} (now ", "data.shuffle_seed = 9176 (now 5), so ",
        "undo the change, or accept it with --checkpoint.accept_changes "
        "training.global_batch_size,data.train,data.shuffle_seed.",
    ):  # fmt: skip
        assert clause in outputs["refused"]
    assert "accept_changes data.train,data.shuffle_seed." in outputs["partly"], "accepted changes are not listed again"
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
        "lr_scheduler.decay_type = linear (now cosine), diffusion.loss_norm = token (now sequence), "
        "parametric_memory.enable = True (now False), data.mask_prompt = False (now True); the run goes on with the "
        "change."
    ) in outputs["experiment"]
    assert outputs["experiment"].count("WARNING") - outputs["made"].count("WARNING") == 1
    for other in ("batch", "data"):
        assert "the run goes on with the change" not in outputs[other]
    run = json.loads((root / "run/checkpoint/step-3/run.json").read_text())
    assert run["format"] == 1 and run["experiment"]["parametric_memory.rank"] == 8
    assert run["length"]["training.steps"] == 3 and run["length"]["training.epochs"] == 0.3


def test_the_first_releases_checkpoint_goes_on(changed):
    """Losses on another number of ranks equal those that the first release printed."""
    losses = scalars(changed[0] / "released")["loss_metrics/global_avg_loss"]
    assert losses == pytest.approx({3: 6.297245979309082, 4: 6.666538715362549}, rel=1e-5)


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
    for content, message in (("{", "Expecting property name"), ("[1]", "it is a list, not an object")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(
            UserError, match=rf"run.json is damaged \({message}.*\); restore the file, or remove it to skip"
        ):
            read_run(Storage(str(tmp_path)))
    with pytest.raises(UserError, match=r"debug.seed = \[7\] \(now 1\)"):
        check("run/step-3", {"identity": {"debug.seed": [7]}}, ours, {}, [])


def test_an_accepted_batch_size_goes_on_in_the_data(changed):
    root, outputs = changed
    before = {s for kind, _, s in draws(root / "draws-made") if kind == "level"}
    after = {s for kind, _, s in draws(root / "draws-batch") if kind == "level"}
    assert " training.epochs = 0.3 is 3 steps of 4 rows (10 an epoch).\n" in outputs["made"]
    assert (
        " training.epochs = 1.2 is 6 steps of 8 rows (5 an epoch); lr_scheduler.warmup_ratio = 0.1 is 2 of 20 steps.\n"
    ) in outputs["batch"]
    assert len(before) == 12 and len(after) == 24 and not before & after, "one epoch of 41, no sample twice"


def test_accepted_data_are_read_from_the_beginning_of_an_epoch(changed):
    root, outputs = changed
    assert "Accepted: the checkpoint was made with data.train fingerprint =" in outputs["data"]
    found = scalars(root / "run")["loss_metrics/global_avg_loss"]
    assert set(found) == set(range(1, 7))
    assert len({s for kind, _, s in draws(root / "draws-data") if kind == "level"}) == 24
