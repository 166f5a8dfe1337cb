"""tools/checkpoints.py on the checkpoints of a real run, and the retention rules."""

import json
import shutil
from itertools import chain, combinations

import pytest

from memdlm_dist import train
from memdlm_dist.checkpoint.catalogue import prunable_steps
from tests.support.launching import debug
from tools import checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save steps 1 to 6 of a run; truncate step 3, flip a bit of step 4, remove the metadata of step 5."""
    out = tmp_path_factory.mktemp("saved")
    arguments = debug(out, "--checkpoint.enable", "--checkpoint.interval", "1", "--training.steps", "6")
    assert train.main(arguments) == 0
    folder = out / "checkpoint"
    for step, damage in ((3, lambda content: content[:-1000]), (4, lambda content: flip(content))):
        file = folder / f"step-{step}/__0_0.distcp"
        file.write_bytes(damage(file.read_bytes()))
    (folder / "step-5/.metadata").unlink()
    (folder / "step-7").mkdir()
    (folder / "step-7/model-00001.safetensors").write_bytes(b"weights")
    (folder / "notes").mkdir()
    return folder


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_list(saved, capsys):
    assert checkpoints.main(["list", str(saved)]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [f"step-{step}" for step in range(1, 8)]
    ends = [
        "intact",
        "intact",
        "bytes",
        "intact",
        "is incomplete: saving it was interrupted",
        "intact",
        "weights alone (safetensors)",
    ]
    assert all(row.endswith(end) for row, end in zip(rows, ends, strict=True)), rows
    assert "has a truncated file __0_0.distcp: " in rows[2] and rows[0].split()[3:5] == ["1", "4"]
    checkpoints.main(["list", str(saved), "--json"])
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["good"] and first["state"] == "good"
    assert first["run"]["identity"]["training.global_batch_size"] == 4 and first["bytes"] > 1e6


def test_verify(saved, capsys):
    assert checkpoints.main(["verify", str(saved)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step-1: intact" and lines[5] == "step-6: intact" and lines[6] == "step-7: intact"
    assert lines[2].startswith("step-3: has a truncated file __0_0.distcp: ")
    assert lines[3].startswith("step-4: has a corrupt file __0_0.distcp: the checksum of ")
    assert lines[4] == "step-5: is incomplete: saving it was interrupted"
    assert checkpoints.main(["verify", str(saved), "--step", "2"]) == 0
    assert checkpoints.main(["verify", str(saved), "--step", "9"]) == 1
    assert "step-9: does not exist" in capsys.readouterr().out


def test_prune(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "checkpoint")
    everything = {path.name for path in folder.iterdir()}
    assert checkpoints.main(["prune", str(folder), "--keep-latest", "1", "--dry-run"]) == 0
    assert "would remove step-1\nwould remove step-2\nwould remove step-4\n1 intact" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == everything
    (folder / "scores.json").write_text('{"1": 2.5, "2": 2.0, "9": 1.0, "6": 3.0}')
    checkpoints.main(["prune", str(folder), "--keep-latest", "1", "--dry-run"])
    assert "would remove step-1\nwould remove step-4\n2 intact" in capsys.readouterr().out, (
        "the best existing checkpoint stays"
    )
    (folder / "scores.json").write_text("[3]")
    assert checkpoints.main(["prune", str(folder), "--keep-latest", "1"]) == 2
    assert "scores.json is damaged (" in capsys.readouterr().err
    (folder / "scores.json").unlink()
    checkpoints.main(["prune", str(folder), "--keep-latest", "1", "--keep-every", "2"])
    assert everything - {path.name for path in folder.iterdir()} == {"step-1"}
    checkpoints.main(["prune", str(folder), "--keep-latest", "1", "--incomplete"])
    assert {path.name for path in folder.iterdir()} == {"step-3", "step-6", "step-7", "notes"}, "damaged ones stay"
    checkpoints.main(["prune", f"file://{folder}", "--keep-latest", "1"])
    assert (folder / "step-6/.metadata").is_file()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["list", "nowhere"], "There is no checkpoint step-N in nowhere; name the folder"),
        (["prune", "nowhere", "--keep-latest", "0"], "--keep-latest must be at least 1"),
        (["prune", "nowhere", "--keep-latest", "1", "--keep-every", "-1"], "--keep-every must not be negative"),
    ],
)
def test_mistakes(arguments, says, capsys):
    assert checkpoints.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_retention_never_removes_everything():
    steps = [2, 4, 5, 9]
    for intact in chain.from_iterable(combinations(steps, n) for n in range(5)):
        for latest in range(5):
            for every in (0, 2, 5):
                removed = prunable_steps(intact, latest, every)
                kept = set(intact) - set(removed)
                assert not intact or max(intact) in kept
                assert all(step in kept for step in sorted(intact)[-latest:])
                assert not every or all(step in kept for step in intact if step % every == 0)
    assert (
        prunable_steps(steps, 1, 0) == [2, 4, 5]
        and prunable_steps(steps, 1, 2) == [5]
        and prunable_steps(steps, 0, 0) == []
    )
