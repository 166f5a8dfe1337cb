"""Two runs on one folder: the second one's error names the writer, on disk and in a store, with any clocks."""

import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import fsspec
import pytest

from memdlm_dist.errors import UserError
from memdlm_dist.runtime import writer
from memdlm_dist.runtime.storage import Storage
from memdlm_dist.runtime.writer import LEASE, Lease, Lock, Writer, claim
from tests.support.launching import debug, run_many
from tests.support.object_store import BUCKET, object_store

ARGUMENTS = [
    "--model.flavor", "tiny", "--training.local_batch_size", "2", "--training.steps", "3", "--checkpoint.enable",
    "--checkpoint.interval", "1",
]  # fmt: skip


def writer_of(job: str, process: int = 1, attempt: tuple[int, ...] = (0, 0)) -> Writer:
    return Writer(job, attempt, "node7", process, "2026-01-01T00:00:00+00:00")


def test_a_second_run_is_refused_on_disk(tmp_path):
    """Runs end with an error while another process holds the folder's lock; after its release the next completes."""
    folder = tmp_path / "run/checkpoint"
    held = claim(str(folder), writer_of("ours"))
    assert isinstance(held, Lock)
    arguments = debug(tmp_path / "run", *ARGUMENTS)
    (refused,) = run_many([(2, arguments, {"status": 2, "faults": [{"do": "impatient"}]})])
    assert "error: Another run writes to " in refused and "Traceback" not in refused
    assert "run/checkpoint: job ours (node node7, process 1, since 2026-01-01T00:00:00+00:00); end it, or" in refused
    held.check()
    held.release()
    assert not folder.exists(), "nothing was saved"
    run_many([(2, arguments)])
    assert {path.name for path in folder.iterdir()} == {"step-1", "step-2", "step-3"}


def test_a_lock_goes_with_its_folder(tmp_path):
    held = Lock(tmp_path / "run", writer_of("ours"))
    (tmp_path / "run").rename(tmp_path / "moved")
    with ThreadPoolExecutor(4) as threads:  # retention checks from its own thread
        list(threads.map(lambda _: held.check(), range(8)))
    assert json.loads((tmp_path / "run" / LEASE).read_text())["job"] == "ours"  # recreated on the same file system
    held._device += 1  # looks like an unmounted folder
    (tmp_path / "run").rename(tmp_path / "again")
    with pytest.raises(OSError, match="is on another file system than at the start of the run"):
        held.check()
    assert not (tmp_path / "run").exists()
    held.release()
    kept = tmp_path / "kept"
    kept.mkdir()
    Lock(kept, writer_of("ours")).release()
    assert kept.exists() and not list(kept.iterdir()), "an existing folder is not removed"


def test_a_lock_that_is_lost_to_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE", 0)
    held = Lock(tmp_path / "run", writer_of("ours"))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(BlockingIOError()))
    with open(tmp_path / "other", "w") as other:
        for _ in range(2):
            with pytest.raises(UserError, match="Another run writes to"):
                held.check()
        held.release()
        other.write("still open")


@pytest.fixture(scope="module")
def url():
    with object_store():
        yield f"s3://{BUCKET}/run"


@pytest.fixture
def soon(monkeypatch):
    for name, seconds in {"EXPIRY": 1.5, "PERIOD": 0.2, "SETTLING": 0.2}.items():
        monkeypatch.setattr(writer, name, seconds)


def kill(lease: Lease) -> None:
    """Stop renewing a lease, like a killed process."""
    lease._stopped.set()
    lease._thread.join()


def test_a_lease_in_a_store(url, soon, monkeypatch):
    first = claim(url, writer_of("a"))
    assert isinstance(first, Lease)
    with pytest.raises(UserError, match=r"Another run writes to s3://\S+/run: job a \(node node7, process 1, since "):
        claim(url, writer_of("b"))
    # A restart of the same job takes over at once; the earlier process fails its next check before a save.
    began = time.monotonic()
    second = claim(url, writer_of("a", process=2, attempt=(1, 0)))
    assert time.monotonic() - began < writer.EXPIRY
    with pytest.raises(UserError, match="process 2"):
        first.check()
    second.check()
    # A concurrent launch of the same job is not a later attempt.
    with pytest.raises(UserError, match="process 2"):
        claim(url, writer_of("a", process=3, attempt=(1, 0)))
    # Another job waits until the lease's counter has not changed for EXPIRY, measured by its own clock.
    kill(second)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    third = claim(url, writer_of("c"))
    with pytest.raises(UserError, match="job c"):
        second.check()
    # A removed lease is recreated.
    Storage(url).remove(LEASE)
    third.check()
    third.release()
    assert not fsspec.filesystem("s3").exists(f"{url}/{LEASE}")
    first.release()


def test_a_renewal_under_way_does_not_keep_a_restart_out(url, soon, monkeypatch):
    """The earlier attempt has checked its lease, and writes it once more after the restart has written its own."""
    first = claim(f"{url}-4", writer_of("a"))
    kill(first)
    write, late = Storage.write_json, [asdict(first._writer)]

    def write_json(self, name, value):
        write(self, name, value)
        if late:
            write(self, name, late.pop())

    monkeypatch.setattr(Storage, "write_json", write_json)
    second = claim(f"{url}-4", writer_of("a", process=2, attempt=(1, 0)))
    assert not late
    second.check()
    second.release()


def test_a_lease_that_cannot_be_read_expires(url, soon):
    assert writer.parse(b"") is writer.parse(b"[1]") is writer.parse(b'{"job": "a"}') is None
    storage = Storage(f"{url}-3")
    fsspec.filesystem("s3").pipe_file(f"{url}-3/{LEASE}", b'{"job": "a')
    began = time.monotonic()
    lease = claim(storage.url(), writer_of("ours"))
    assert time.monotonic() - began > writer.EXPIRY
    value = json.loads(storage.read(LEASE))
    assert writer.parse(json.dumps({**value, "later": 1}).encode()) is not None, "keys of later versions are ignored"
    storage.write_json(LEASE, {"job": 1})
    with pytest.raises(UserError, match=r"run-3: one whose writer.json cannot be read; end it"):
        lease.check()
    lease.release()
    storage.remove(LEASE)


def test_two_that_come_at_once(url, soon):
    """Later writers get the lease in a store without conditional writes."""
    storage = Storage(f"{url}-2")

    class Slow(Storage):
        def create_json(self, name, value):
            super().create_json(name, value)
            storage.write_json(name, asdict(writer_of("other")))

    with pytest.raises(UserError, match="job other"):
        Lease(Slow(f"{url}-2"), writer_of("ours"))
    storage.remove(LEASE)
    storage.create_json(LEASE, {"x": 1})
    storage.create_json(LEASE, {"x": 2})
    assert storage.read_json(LEASE) == {"x": 1}
