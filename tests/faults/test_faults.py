"""Failures of long runs, caused for real in ranks on gloo; each restart resumes bit for bit."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from memdlm_dist import train
from memdlm_dist.checkpoint.catalogue import Catalogue
from memdlm_dist.checkpoint.manager import MEMORY_OFF
from tests.support import zygote
from tests.support.launching import debug, run_many, scalars
from tests.support.published import contents
from tools import convert_checkpoint

LOSS = "loss_metrics/global_avg_loss"
COMMON = [
    "--model.flavor", "tiny", "--training.local_batch_size", "2", "--training.steps", "8", "--checkpoint.enable",
    "--checkpoint.interval", "2", "--lr_scheduler.total_steps", "8",
]  # fmt: skip
SKIP = ["--reliability.on_nonfinite", "skip"]
# With these, the host reads a step's consensus flags one step later; checkpoints are saved every other step.
LATE = [*SKIP, "--optimizer.implementation=fused", "--metrics.log_freq=100"]
SHORT = ["--comm.train_timeout_seconds", "2", "--checkpoint.no_enable"]


def fault(do: str, at: str, step: int, rank: int | None = 1, **more) -> dict:
    return {"do": do, "at": at, "step": step, **({} if rank is None else {"rank": rank}), **more}


FULL, ROOM = fault("full", "step", 3), fault("room", "step", 7)
BEST = [
    "--checkpoint.interval=1", "--checkpoint.keep_latest_k", "2", "--checkpoint.keep_best", MEMORY_OFF,
    "--validation.enable", "--validation.freq=1", "--validation.steps=1", "--optimizer.lr=1",
    "--checkpoint.folder", "{root}/best-checkpoints",
]  # fmt: skip
# folder -> its consecutive runs: (expected exit status, faults[, arguments])
SCENARIOS = {
    "straight": [(0, [])],
    "killed": [
        (-9, [fault("SIGKILL", "step", 4)]),
        (-9, [fault("SIGKILL", "write", 6)]),
        (-9, [fault("SIGKILL", "metadata", 6, rank=0)]),
        (0, []),
    ],
    "full": [(0, [FULL, ROOM])],
    "full-stops": [(2, [FULL], ["--reliability.on_save_failure", "stop"])],
    "full-at-last": [(2, [fault("bug", "save", 4, rank=None), fault("full", "step", 7)])],
    "nan": [(2, [fault("nan", "step", 3)], LATE[2:])],
    "nan-skipped": [
        (0, [fault("nan", "step", 3)], [*SKIP, "--training.steps", "4"]),
        (0, [], [*SKIP, "--training.steps", "5"]),
    ],
    "nan-always": [
        (2, [fault("nan", "step", n) for n in (2, 3, 4)], [*SKIP, "--reliability.max_consecutive_skips", "3"])
    ],
    "late": [(0, [fault("nan", "step", 4)], LATE)],
    "late-asked": [(75, [fault("nan", "step", 4), fault("SIGTERM", "step", 5)], LATE), (0, [], LATE)],
    "hang-step": [(2, [fault("hang", "step", 3)], SHORT)],
    "hang-data": [(2, [fault("hang", "data", 3)], SHORT)],
    "stopped-process": [(2, [fault("SIGSTOP", "step", 3)], SHORT)],
    "asked": [
        (75, [fault("SIGTERM", "step", 3)], ["--checkpoint.save_in_hf"]),
        (75, [fault("SIGUSR1", "data", 7, rank=0)], ["--checkpoint.async_mode", "async", "--checkpoint.save_in_hf"]),
        (0, []),
    ],
    "asked-twice": [(143, [fault(do, "step", 2, rank=0) for do in ("SIGTERM", "sleep", "SIGTERM")])],
    "removed": [(0, [fault("remove", "step", 5, rank=0, path="{root}/removed/checkpoint")])],
    "stolen": [
        (2, [fault("steal", "step", 3, rank=0, path="file://{root}/elsewhere")], ["--checkpoint.folder", "file://{root}/elsewhere"])
    ],
    "interrupted": [(130, [fault("SIGINT", "write", 4)]), (0, [])],
    "skewed": [
        (0, [fault("skew", "", 0), fault("work", "step", 3)],
         ["--comm.train_timeout_seconds", "4", "--checkpoint.no_enable", "--training.steps", "4"])
    ],
    "retention": [
        (0, [fault("bug", "convert", 5), fault("raise", "consolidate", 6),
             fault("full", "export", 7), fault("room", "step", 8),
             # As a run leaves it that is killed while it exports.
             fault("mark", "step", 8, rank=0, once="{root}/retention/checkpoint/step-6/hf.partial/sharded/model")],
         ["--checkpoint.interval=1", "--checkpoint.keep_latest_k", "2", "--checkpoint.keep_every", "3",
          "--checkpoint.save_in_hf"])
    ],
    # The held-out loss is lowest early, because the learning rate is far too high; run 2 uses another output folder.
    "best": [
        (0, [], [*BEST, "--training.steps", "6"]),
        (0, [], [*BEST, "--job.dump_folder", "{root}/best-elsewhere"]),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return folder and outputs of all scenarios; one launch of Python serves all runs."""
    root = tmp_path_factory.mktemp("faults")
    return root, _run(root, SCENARIOS)


def _run(root: Path, scenarios: dict) -> dict[str, list[str]]:
    flat = [(name, *run) for name, runs in scenarios.items() for run in runs]
    outputs = run_many(
        (
            2,
            debug(root / name, *COMMON, *(a.replace("{root}", str(root)) for a in (arguments or [[]])[0])),
            {"status": status, "faults": json.loads(json.dumps(faults).replace("{root}", str(root)))},
        )
        for name, status, faults, *arguments in flat
    )
    outputs_by_name: dict[str, list[str]] = {}
    for (name, *_), output in zip(flat, outputs, strict=True):
        outputs_by_name.setdefault(name, []).append(output)
    return outputs_by_name


def losses(out: Path) -> dict[int, float]:
    return scalars(out)[LOSS]


def saved(root: Path, name: str, step: int) -> dict[str, bytes]:
    """Return a checkpoint's files of weights, optimizer, schedule and counters."""
    return {f.name: f.read_bytes() for f in (root / name / f"checkpoint/step-{step}").glob("*.distcp")}


def same_end(root: Path, name: str) -> bool:
    """Return whether all losses and the last checkpoint equal the undisturbed run's bit for bit."""
    curves = [losses(root / run) for run in ("straight", name)]
    ends = [saved(root, run, 8) for run in ("straight", name)]
    return curves[0] == curves[1] and list(curves[0]) == [*range(1, 9)] and ends[0] == ends[1] and len(ends[0]) == 2


def test_a_rank_that_is_killed_in_mid_step_and_while_saving(finished):
    """Kills within a step, with a half-written file, and with all files but no metadata: four starts, one run."""
    root, outputs = finished
    first, second, third, last = outputs["killed"]
    assert "Loading the checkpoint" not in first and re.search(r"Loading the checkpoint \S+step-2\.", second)
    for output in (third, last):
        assert re.search(r"Skipping the checkpoint \S+step-6: it is incomplete: saving it was interrupted", output)
        assert re.search(r"Loading the checkpoint \S+step-4\.", output)
    assert same_end(root, "killed") and "Traceback" not in last


DAMAGES = {
    "truncated": r"has a truncated file __1_0\.distcp: [\d,]+ of [\d,]+ bytes",
    "missing": r"lacks the file __1_0\.distcp",
    "flipped": r"cannot be read \(rank \d: the file __1_0\.distcp is corrupt: a checksum is wrong\)",
    "metadata": r"has a \.metadata that cannot be read \(.*",
}


@pytest.fixture(scope="module")
def damaged(finished, tmp_path_factory):
    """Return folder and outputs of runs that continue a damaged step 4, by load_step and by default."""
    straight, root = finished[0] / "straight/checkpoint", tmp_path_factory.mktemp("damaged")
    for damage in DAMAGES:
        for step in ("step-2", "step-4"):
            shutil.copytree(straight / step, root / damage / "checkpoint" / step)
        file = root / damage / "checkpoint/step-4" / (".metadata" if damage == "metadata" else "__1_0.distcp")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= damage == "flipped"
        file.write_bytes(content if damage == "flipped" else content[:-100])
        if damage == "missing":
            file.unlink()
    runs = [(2, [], ["--checkpoint.load_step", "4"]), (0, [], ["--training.steps", "6"])]
    return root, _run(root, dict.fromkeys(DAMAGES, runs))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished, damaged, damage):
    root, outputs = damaged
    asked, default = outputs[damage]
    assert re.search(rf"error: The checkpoint \S+step-4 {DAMAGES[damage]}; choose another checkpoint.load_step", asked)
    assert re.search(rf"Skipping the checkpoint \S+step-4: it {DAMAGES[damage]}", default)
    assert re.search(r"Loading the checkpoint \S+step-2\.", default) and "Traceback" not in asked + default
    undisturbed = losses(finished[0] / "straight")
    assert losses(root / damage) == {step: undisturbed[step] for step in range(3, 7)}
    kept = {path.name for path in (root / damage / "checkpoint").iterdir()}
    assert kept == {"step-2", "step-4", "step-6", "step-4.replaced-1"}, "the damaged checkpoint is renamed"


def test_a_full_disk(finished):
    """Two saves fail on a full disk; training continues until a save succeeds, or stops if configured."""
    root, outputs = finished
    (goes_on,), (stops,), (last,) = (outputs[name] for name in ("full", "full-stops", "full-at-last"))
    for step in (4, 6):
        assert re.search(
            rf"ERROR - The checkpoint \S+step-{step} could not be saved \(rank 1: .*\); earlier ones", goes_on
        )
    assert re.search(r"; [\d,]+ MiB were free\)", goes_on) and "Traceback" not in goes_on + stops
    assert same_end(root, "full")
    assert {path.name for path in (root / "full/checkpoint").iterdir()} == {"step-2", "step-8"}
    assert re.search(r"error: The checkpoint \S+step-4 could not be saved .*make room", stops)
    assert re.search(r"error: The checkpoint \S+step-8 could not be saved", last), "the last failure is reported"


def test_a_save_that_fails_of_something_unexpected(finished):
    """Training continues after an unexpected exception in a save, and the next save succeeds."""
    root, outputs = finished
    (last,) = outputs["full-at-last"]
    sentence = r"ERROR - The checkpoint \S+step-4 could not be saved \(rank 0: KeyError: 'layers.0'; [\d,]+ MiB"
    assert re.search(sentence, last)
    # Each rank logs the error at once with a traceback, because its cause is unknown.
    assert len(re.findall(r"Saving the checkpoint of step 4 failed on this rank: KeyError: 'layers.0'", last)) == 2
    assert len(re.findall(r"Traceback \(most recent call last\)", last)) == 2
    assert {path.name for path in (root / "full-at-last/checkpoint").iterdir()} == {"step-2", "step-6"}


def test_a_background_save_outlives_a_signal_to_the_whole_job(tmp_path):
    status, output = zygote.run(1, "tests.workers.saving:signalled", str(tmp_path))
    assert status == 0, output


def test_a_loss_that_is_not_a_number(finished):
    root, outputs = finished
    (stopped,), (skipped, resumed), (always,) = (outputs[name] for name in ("nan", "nan-skipped", "nan-always"))
    sentence = r"error: Step 3 cannot be taken: the loss is nan on at least one of samples \d+, \d+; "
    assert len(re.findall(sentence, stopped)) == 1 and "Traceback" not in stopped
    assert not (root / "nan/checkpoint/step-4").exists(), "the host learns of step 3 before the save of step 4"
    assert len(re.findall(r"rank [01]\].*Skipping the batch of step 3: the loss is nan on at least", skipped)) == 2
    curves, straight = scalars(root / "nan-skipped"), losses(root / "straight")
    assert curves["reliability/skipped_batches"] == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}, "the count survives a restart"
    # Losses equal the undisturbed run's before the skip; afterwards one update is missing.
    assert [curves[LOSS][step] for step in (1, 2)] == [straight[step] for step in (1, 2)]
    assert curves[LOSS][3] != curves[LOSS][3] and 0 < abs(curves[LOSS][4] - straight[4]) < 1
    assert "Loading the checkpoint" in resumed
    assert "Step 4 is the last of 3 steps in a row that cannot be taken" in always


def test_flags_that_are_read_late(finished):
    """Flags are read at once before a save; a stop takes effect one step later; resuming is bit for bit."""
    root, outputs = finished
    (skipped,), (asked, resumed) = (outputs[name] for name in ("late", "late-asked"))
    for output in (skipped, asked):
        sentence = r"rank [01]\].*Skipping the batch of step 4: the loss is nan on at least.*Skipped so far: 1\."
        assert len(re.findall(sentence, output)) == 2
    assert len(re.findall("Stopped after step 6, saved in ", asked)) == 2
    assert re.search(r"Loading the checkpoint \S+step-6\.", resumed) and "Skipping the batch" not in resumed
    for step in (4, 6, 8):
        assert len(saved(root, "late", step)) == 2 and saved(root, "late", step) == saved(root, "late-asked", step)
    assert "Traceback" not in skipped + asked + resumed


@pytest.mark.parametrize(
    "name, status",
    [
        ("hang-step", r"rank 1 \(node \S+, process \d+\) is taking step 3 \(support/faults\.py:\d+ in hang\)"),
        (
            "hang-data",
            r"rank 1 \(node \S+, process \d+\) is loading the data of step 3 \(support/faults\.py:\d+ in hang\)",
        ),
        (
            "stopped-process",
            r"rank 1 \(node \S+, process \d+, silent for \d+ s\) was last seen (taking|finishing) step \d",
        ),
    ],
)
def test_a_rank_that_hangs_is_named(finished, name, status):
    (output,) = finished[1][name]
    sentence = next(line for line in output.splitlines() if line.startswith("error: No progress for"))
    assert re.search(rf"{status}.*, while rank 0 waited in taking step 3", sentence), sentence


def test_asked_to_stop(finished):
    """Both ranks finish the step, save, and exit with the stop request's status after a signal to one of them."""
    root, outputs = finished
    first, second, third = outputs["asked"]
    line = next(line for line in first.splitlines() if "Received SIGTERM" in line)
    assert "rank 1]" in line and "exiting with status 75" in line
    assert len(re.findall("Stopped after step 3, saved in ", first)) == 2
    assert re.search(r"Loading the checkpoint \S+step-3\.", second)
    assert re.search(r"Loading the checkpoint \S+step-[67]\.", third)
    assert same_end(root, "asked")
    assert "Received SIGTERM again: exiting at once, without saving." in outputs["asked-twice"][0]
    assert not list((root / "asked-twice/checkpoint").glob("step-*"))


def test_a_folder_that_is_removed_in_mid_run(finished):
    root, outputs = finished
    assert re.search(r"removed/checkpoint was removed or replaced while the run wrote to it", outputs["removed"][0])
    assert {path.name for path in (root / "removed/checkpoint").iterdir()} == {"step-6", "step-8"}
    assert same_end(root, "removed") and "Traceback" not in outputs["removed"][0]


def test_a_run_whose_folder_another_job_has_taken_stops(finished):
    root, outputs = finished
    assert re.search(
        r"error: Another run writes to file://\S+/elsewhere: job other \(node node7, proc", outputs["stolen"][0]
    )
    assert {path.name for path in (root / "elsewhere").iterdir() if path.is_dir()} == {"step-2"}
    assert "Traceback" not in outputs["stolen"][0]


def test_a_keyboard_interrupt_in_a_save_ends_the_run(finished):
    root, outputs = finished
    interrupted, resumed = outputs["interrupted"]
    assert "step:  5" not in interrupted and "Traceback" not in interrupted
    assert re.search(r"Skipping the checkpoint \S+step-4: it is incomplete", resumed)
    assert same_end(root, "interrupted")


def test_clocks_are_not_compared(finished):
    """A late clock and a long step on one rank do not count as a hang."""
    (output,) = finished[1]["skewed"]
    assert "No progress" not in output and "Training completed" in output


def test_retention(finished):
    root, outputs = finished
    assert {path.name for path in (root / "retention/checkpoint").iterdir()} == {"step-3", "step-6", "step-7", "step-8"}
    assert "Removing the checkpoint of step 1." in outputs["retention"][0]
    losses = scalars(root / "best")[MEMORY_OFF] | scalars(root / "best-elsewhere")[MEMORY_OFF]
    best = min(range(1, 9), key=losses.__getitem__)
    assert best < 5 and set(losses) == set(range(9)), losses
    kept = {path.name for path in (root / "best-checkpoints").iterdir() if path.is_dir()}
    assert kept == {f"step-{best}", "step-7", "step-8"}


def test_an_export_that_fails_leaves_its_checkpoint(finished):
    """Exports fail when one rank converts tensors or writes files, and on a full disk; the checkpoints are the same."""
    root, outputs = finished
    kept = {step: root / f"retention/checkpoint/step-{step}" for step in (3, 6, 7, 8)}
    sentence = (
        r"ERROR - The export \S+step-{}/hf could not be written \(rank 1: {}; [\d,]+ MiB were free\); its checkpoint"
    )
    for step, reason in ((5, "KeyError: 'layers.0'"), (6, "away for a moment"), (7, ".*File too large.*")):
        assert re.search(sentence.format(step, reason), outputs["retention"][0])
    (unexpected,) = re.findall(r"ERROR - (.*)\nTraceback", outputs["retention"][0])
    assert unexpected == "Preparing the tensors of an export failed on this rank: KeyError: 'layers.0'."
    assert same_end(root, "retention")
    assert [step for step, folder in kept.items() if (folder / "hf").exists()] == [3, 8]
    assert not list(root.rglob("hf.partial"))
    saved = {checkpoint.step: checkpoint for checkpoint in Catalogue(str(root / "retention/checkpoint")).all()}
    assert all(checkpoint.intact for checkpoint in saved.values())
    export = sum(file.stat().st_size for file in (kept[8] / "hf").iterdir())
    assert export > 2**16 and abs(saved[8].size - export - saved[7].size) < 2**12


def test_exports_beside_background_saves_and_a_stop_request(finished):
    """A stop request leaves no time for an export; the other checkpoints have one, also those saved by a thread."""
    root, outputs = finished
    kept = {path.parent.name for path in (root / "asked/checkpoint").glob("step-*/hf")}
    stopped = re.search(r"Stopped after (step) (\d), saved in ", outputs["asked"][1])
    assert stopped and kept == {"step-2", "step-4", "step-6"} - {"-".join(stopped.groups())}
    theirs = root / "asked/checkpoint/step-4"  # saved by a thread of the second run
    out = ["--output", str(root / "asked-4"), "--model.flavor", "tiny"]
    assert convert_checkpoint.main(["to-hf", "train_configs/debug.toml", "--checkpoint", str(theirs), *out]) == 0
    ours, expected = contents(theirs / "hf"), contents(root / "asked-4")
    assert ours.keys() == expected.keys() and all(torch.equal(x, expected[key]) for key, x in ours.items())


def test_a_disk_that_is_really_full(tmp_path, capsys):
    """One checkpoint fits on a small tmpfs and the second does not; skipped where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        arguments = debug(disk, "--checkpoint.enable", "--checkpoint.interval", "1", "--training.steps", "2")
        # The first checkpoint leaves no room for its export.
        assert train.main([*arguments, "--training.steps", "1", "--checkpoint.save_in_hf"]) == 2
        sentence = (
            r"error: The export \S+step-1/hf could not be written \(rank 0: it needs \d MiB; \d MiB were free\); "
        )
        assert re.search(sentence + "its checkpoint is not affected: make room", capsys.readouterr().err)
        assert train.main(arguments) == 2
        assert "step-2 could not be saved (rank 0: " in (error := capsys.readouterr().err) and " MiB were free" in error
        assert [path.name for path in (disk / "checkpoint").iterdir()] == ["step-1"]
        assert Catalogue(str(disk / "checkpoint")).inspect(1).intact
    finally:
        subprocess.run(["umount", disk], check=True)
