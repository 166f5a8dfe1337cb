"""Shards and checkpoints in an object store with outages; shared memory left by killed runs."""

import glob
import os
import re
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from memdlm_dist.data import shared_memory
from memdlm_dist.data.dataset import TokenDataset
from memdlm_dist.errors import UserError
from memdlm_dist.runtime import storage
from tests.support.launching import debug, run_many, scalars
from tests.support.object_store import BUCKET, object_store

LOSS = "loss_metrics/global_avg_loss"
COMMON = [
    "--model.flavor", "tiny", "--training.local_batch_size", "2", "--checkpoint.enable", "--checkpoint.interval", "2",
    "--lr_scheduler.total_steps", "8", "--training.steps",
]  # fmt: skip
IMPATIENT = {"do": "impatient"}


def shut_when_marked(store, marks: dict[Path, float | None]) -> threading.Thread:
    """Shut the store when a run creates a mark file, for that mark's number of seconds (None: until it is opened)."""

    def watch() -> None:
        remaining = dict(marks)
        while remaining:
            for mark in [mark for mark in remaining if mark.exists()]:
                seconds = remaining.pop(mark)
                store.proxy.shut() if seconds is None else store.shut_for(seconds)
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def live():
    """Open a dataset as another live job on this node."""
    return TokenDataset(local="tests/assets/debug/heldout", batch_size=1, shuffle=False, check_hash="")


@pytest.fixture(scope="module")
def runs(live, tmp_path_factory):
    """Run on disk, in the store in two parts, with short outages, with a kill and with a lasting outage."""
    root = tmp_path_factory.mktemp("remote")
    with object_store() as store:
        bucket = fsspec.filesystem("s3")
        bucket.put("tests/assets/debug/train", f"{BUCKET}/train", recursive=True)

        def arguments(name: str, steps: str, *more: str) -> list[str]:
            remote = ["--checkpoint.folder", f"s3://{BUCKET}/{name}", "--data.train", f"s3://{BUCKET}/train"]
            cache = ["--data.cache_folder", str(root / "cache" / name)]
            return debug(root / name, *COMMON, steps, *remote, *cache, *more)

        def mark(name: str, at: str, step: int) -> dict:
            return {"do": "mark", "at": at, "step": step, "rank": 0, "once": str(root / name)}

        url = f"file://{Path('tests/assets/debug/train').resolve()}"
        cache = ["--data.train", url, "--data.cache_folder", str(root / "cache/killed")]
        killed = debug(root / "killed", *COMMON, "8", *cache, "--training.dataloader.num_workers", "1")
        environment = {"environment": store.environment | {"AWS_MAX_ATTEMPTS": "1"}}
        entries = {
            "local": (2, debug(root / "local", *COMMON, "8")),
            "first": (2, arguments("parts", "4"), environment),
            "second": (
                2, arguments("parts", "8", "--checkpoint.async_mode", "async", "--checkpoint.keep_latest_k", "2"),
                environment,
            ),
            # The store is unavailable for a moment while step 4 is saved.
            "away": (2, arguments("away", "8"), environment | {"faults": [mark("shut-1", "write", 4)]}),
            # Any other URL works as well. Rank 1's first write of step 4 fails.
            "file": (
                2, arguments("file", "8", "--checkpoint.folder", f"file://{root}/elsewhere"),
                environment | {"faults": [mark("once", "write", 4) | {"do": "raise", "rank": 1}]},
            ),
            "killed": (2, killed, {"status": -9, "faults": [{"do": "SIGKILL", "at": "step", "step": 4}]}),
            "after": (2, killed),
            "gone": (
                2, arguments("gone", "4"),
                environment | {"status": 2, "faults": [mark("shut-2", "step", 4), IMPATIENT]},
            ),
            "still-gone": (
                1, arguments("still-gone", "8"), environment | {"status": 2, "faults": [IMPATIENT]},
            ),
        }  # fmt: skip
        shut_when_marked(store, {root / "shut-1": 1.5, root / "shut-2": None})
        outputs = dict(zip(entries, run_many(entries.values()), strict=True))
        store.proxy.open()
        bucket.invalidate_cache()
        yield root, outputs, sorted(path.removeprefix(f"{BUCKET}/") for path in bucket.find(BUCKET))


def losses(out: Path) -> dict[int, float]:
    return scalars(out)[LOSS]


def test_a_run_in_the_store_is_the_local_run(runs):
    root, outputs, objects = runs
    assert losses(root / "parts") == losses(root / "local") and list(losses(root / "local")) == [*range(1, 9)]
    assert f"Loading the checkpoint s3://{BUCKET}/parts/step-4." in outputs["second"]
    files = (".metadata", "__0_0.distcp", "__1_0.distcp", "run.json")
    assert [name for name in objects if name.startswith("parts/")] == [
        f"parts/{step}/{file}" for step in ("step-6", "step-8") for file in files
    ], "keep_latest_k applies to stores as well"
    assert (root / "parts/tb").is_dir() and not (root / "parts/checkpoint").exists()
    assert len(list((root / "cache/parts").rglob("*.mds"))) == 1


def test_a_store_that_is_away_for_a_moment_is_waited_for(runs):
    root, outputs, objects = runs
    assert (root / "shut-1").exists() and "Traceback" not in outputs["away"]
    assert losses(root / "away") == losses(root / "local")
    assert {name.split("/")[1] for name in objects if name.startswith("away/")} == {f"step-{n}" for n in (2, 4, 6, 8)}


def test_a_save_that_fails_on_a_url_is_tried_again(runs):
    root, outputs, _ = runs
    reason = r"Saving the checkpoint of step 4 failed \(rank 1: away for a moment\); trying again in 1 s"
    assert len(re.findall(reason, outputs["file"])) == 2, "both ranks try again"
    assert {path.name for path in (root / "elsewhere").iterdir()} == {f"step-{n}" for n in (2, 4, 6, 8)}
    assert losses(root / "file") == losses(root / "local")


def test_a_store_that_is_gone_is_named(runs):
    _, outputs, objects = runs
    sentence = rf"error: The checkpoint s3://{BUCKET}/gone/step-4 could not be saved \(.*connect.*\); earlier ones"
    assert re.search(sentence, outputs["gone"]), outputs["gone"][-3000:]
    # The run could not release its lease, which expires.
    assert {name.split("/")[1] for name in objects if name.startswith("gone/")} == {"step-2", "writer.json"}
    sentence = (
        rf"error: s3://{BUCKET}/still-gone cannot be written to \(.*connect.*\); check the file system or the store, or"
    )
    assert re.search(sentence, outputs["still-gone"]) and "Traceback" not in outputs["gone"] + outputs["still-gone"]


def test_waiting_for_a_store(monkeypatch, caplog):
    waits, answers = [], [OSError("away"), TimeoutError("still"), "here"]
    monkeypatch.setattr(storage.time, "sleep", waits.append)

    def action():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storage.retrying(action, "Reading it") == "here" and waits == [1, 2]
    answers[:] = [FileNotFoundError("no such object"), "never asked"]
    with pytest.raises(FileNotFoundError):
        storage.retrying(action, "Reading it")
    monkeypatch.setattr(storage, "PATIENCE", 0)
    answers[:] = [OSError("away")]
    with pytest.raises(OSError, match="away"):
        storage.retrying(action, "Reading it")


@pytest.mark.parametrize(
    "location, message",
    [("s4://bucket/run", "s4://bucket/run is not a location that can be opened"), ("gs://b/r", "needs a package")],
)
def test_urls_that_cannot_be_opened(location, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=message):
        storage.Storage(location)


def test_shared_memory_of_a_killed_run(runs, live, monkeypatch):
    """Restarts take over a killed run's cache folder; a live job's shared memory stays and is not shared."""
    root, outputs, _ = runs
    assert "Removing shared memory of an earlier run that was killed" in outputs["after"]
    assert list(losses(root / "killed")) == [*range(1, 9)] and "step:  4" not in outputs["killed"]
    live_memory = set(glob.glob(f"/dev/shm/{live._shm_prefix_int:06}_*"))
    assert len(live_memory) > 3 and live[3]["sample_id"] == 3

    # If the live job cached a remote in its folder, no other job could use it. getpid() is patched to look like one.
    folder = os.path.abspath("tests/assets/debug/heldout")
    monkeypatch.setattr(shared_memory, "PATIENCE", 0)
    monkeypatch.setattr(shared_memory.os, "getpid", lambda: 0)
    shared_memory.remove_leftovers([folder], [])
    assert live_memory <= set(glob.glob("/dev/shm/*")), "folders without a remote are shared: memory in use stays"
    with pytest.raises(UserError, match=rf"Another job \(process \d+\) uses the cache folder {folder}; give this run"):
        shared_memory.remove_leftovers([folder], [folder])
    assert live_memory <= set(glob.glob("/dev/shm/*"))
