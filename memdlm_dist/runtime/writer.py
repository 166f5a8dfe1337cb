"""One writer per folder: a lock on disk or a lease in a store, so that two runs never rename each other's files.

The kernel releases a lock when its process ends. A store has no locks: the writer increments a counter in a small
object, the lease. Another job takes the folder only after the counter has not changed for `EXPIRY` seconds on that
job's clock. Clocks of different machines are never compared.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from memdlm_dist.errors import UserError
from memdlm_dist.runtime.launcher import JOB
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage, is_remote

logger = logging.getLogger()

LEASE = "writer.json"
LOCK = ".writer.lock"
# Seconds. EXPIRY: a lease without a renewal is valid for this long. PERIOD: time between two renewals. SETTLING: time
# after which two writers that start at once see which lease was written last. PATIENCE: time for which a lock is
# awaited, since the processes of a killed run take a while to end.
EXPIRY, PERIOD, SETTLING, PATIENCE = 60.0, 10.0, 1.0, 10.0


@dataclass(frozen=True)
class Writer:
    """Run that writes to a folder; its fields are the JSON of the lease file.

    Attributes:
        job: name of the job, the same for all of its attempts.
        attempt: (requeues by the batch system, restarts by the launcher).
        node: host name.
        process: process id.
        since: start time, ISO 8601 in UTC.
        token: unique per process.
        count: number of renewals of the lease.
    """

    job: str
    attempt: tuple[int, ...]
    node: str
    process: int
    since: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    count: int = 0

    def __str__(self) -> str:
        return f"job {self.job} (node {self.node}, process {self.process}, since {self.since})"


def this_process() -> Writer:
    """Return this process as a writer; without the launcher's job name, the process is a separate job."""
    environment = os.environ
    node = socket.gethostname()
    attempt = tuple(int(environment.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Writer(environment.get(JOB) or f"{node}/{os.getpid()}", attempt, node, os.getpid(), now)


def parse(content: bytes) -> Writer | None:
    """Parse a lease, ignoring fields that a later version may have added; None if `content` is not a lease."""
    try:
        values = {name: value for name, value in json.loads(content).items() if name in Writer.__dataclass_fields__}
        return Writer(**{**values, "attempt": tuple(values["attempt"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Claim(Protocol):
    """Exclusive right to write to a folder."""

    def check(self) -> None:
        """Verify the claim; call before every save and deletion.

        Raises:
            UserError: if another run has claimed the folder.
            OSError: if the folder is not accessible, perhaps temporarily.
        """

    def release(self) -> None:
        """Release the folder for other runs."""


def claim(location: str, writer: Writer) -> Claim:
    """Claim a folder or URL for a run: by a lock on disk, by a lease at a URL or on disks without locks.

    Raises:
        UserError: if another run has claimed the location, or if the location is not accessible.
    """
    try:
        if is_remote(location):
            return Lease(Storage(location), writer)
        try:
            return Lock(Path(location), writer)
        except _NoLocksError as error:
            logger.warning(f"The file system of {location} has no locks ({error}); using a lease file instead.")
            return Lease(Storage(location), writer)
    except UserError:
        raise
    except Exception as error:  # each remote file system has different error classes
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{location} cannot be written to ({reason}); check the file system or the store, or choose another folder."
        ) from None


@contextlib.contextmanager
def claimed(location: str, writer: Writer) -> Iterator[Claim]:
    """Claim a folder or URL in a context; for errors see `claim`."""
    folder_claim = claim(location, writer)
    try:
        yield folder_claim
    finally:
        folder_claim.release()


def _taken_error(location: str, other: Writer | None) -> UserError:
    """Return the error for a location that the run `other` has claimed; None if its lease cannot be read."""
    return UserError(
        f"Another run writes to {location}: {other or f'one whose {LEASE} cannot be read'}; end it, or choose another "
        "folder."
    )


class _NoLocksError(Exception):
    """Raised if the file system does not support locks."""


class Lock:
    """Claim of a folder on disk: a POSIX record lock on a file in the folder.

    Unlike a lock of flock, a record lock is not inherited by child processes, so a loader worker that outlives its rank
    by some seconds does not hold it. Network file systems support record locks. Pitfall: the kernel releases the lock
    when this process closes any descriptor of the file, so the process must not open the file a second time.
    """

    def __init__(self, folder: Path, writer: Writer):
        self._folder, self._writer = folder, writer
        self._created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._device = os.stat(folder).st_dev
        self._check_lock = threading.Lock()  # retention calls `check` from a separate thread
        self._descriptor = self._acquire()

    def _acquire(self) -> int:
        """Lock the file, waiting for at most `PATIENCE` seconds; return its descriptor.

        Raises:
            UserError: if another process still holds the lock.
            _NoLocksError: if the file system does not support locks.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    break
                os.close(descriptor)  # the previous writer has just released the lock and removed the file
                continue
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise _taken_error(str(self._folder), self._other()) from None
                time.sleep(0.2)
            except OSError as error:
                os.close(descriptor)
                raise _NoLocksError(error.strerror) from None
        (self._folder / LEASE).write_text(json.dumps(asdict(self._writer)) + "\n")
        return descriptor

    def _other(self) -> Writer | None:
        """Return the run that the lease file names."""
        with contextlib.suppress(OSError):
            return parse((self._folder / LEASE).read_bytes())
        return None

    def _is_current(self, descriptor: int) -> bool:
        """Return whether `descriptor` is the lock file that the folder has now."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._folder / LOCK), os.fstat(descriptor))
        return False

    def check(self) -> None:
        """Verify the lock; a folder that was removed or replaced is recreated and locked again. See `Claim.check`."""
        with self._check_lock:
            if self._is_current(self._descriptor):
                return
            parent = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
            if os.stat(parent).st_dev != self._device:
                raise OSError(f"{self._folder} is on another file system than at the start of the run")
            self._folder.mkdir(parents=True, exist_ok=True)
            previous, self._descriptor = self._descriptor, self._acquire()
            os.close(previous)
            logger.warning(f"{self._folder} was removed or replaced while the run wrote to it; the run recreated it.")

    def release(self) -> None:
        """Remove lock and lease files, and the folder if this claim created it and it is empty."""
        with contextlib.suppress(OSError):
            if self._is_current(self._descriptor):
                for name in (LEASE, LOCK):
                    (self._folder / name).unlink(missing_ok=True)
                if self._created:
                    self._folder.rmdir()  # fails if something was saved
        os.close(self._descriptor)


class Lease:
    """Claim of a folder in a store: an object that names the writer; a thread renews it every `PERIOD` seconds."""

    def __init__(self, storage: Storage, writer: Writer):
        self._storage, self._writer = storage, writer
        self._stopped = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def _read(self) -> bytes | None:
        try:
            return self._storage.read(LEASE)
        except FileNotFoundError:
            return None

    def _acquire(self) -> None:
        """Write this writer's lease, once no other run holds one.

        Raises:
            UserError: if another run holds the lease.
        """
        lease, value = self._read(), asdict(self._writer)
        if self._is_earlier_attempt(lease):
            logger.info(f"Taking over {self._storage.url()} from an earlier attempt of this job.")
        elif lease is not None:
            self._wait_for_expiry(lease)
        if lease is None:
            self._storage.create_json(LEASE, value)
        else:
            self._storage.write_json(LEASE, value)
        # Without conditional writes two leases may have been written: the store keeps the last one.
        time.sleep(SETTLING)
        if self._is_earlier_attempt(self._read()):
            # The earlier attempt was renewing its lease meanwhile. Its next renewal finds this one and stops.
            self._storage.write_json(LEASE, value)
            time.sleep(SETTLING)
        self.check()

    def _is_earlier_attempt(self, lease: bytes | None) -> bool:
        """Return whether a lease is that of an earlier attempt of this writer's job."""
        holder = parse(lease) if lease is not None else None
        return holder is not None and holder.job == self._writer.job and holder.attempt < self._writer.attempt

    def _wait_for_expiry(self, lease: bytes) -> None:
        """Wait until another run's lease has not changed for `EXPIRY` seconds.

        Raises:
            UserError: if the lease changes: the other run is alive.
        """
        holder = parse(lease) or f"a run whose {LEASE} cannot be read"
        logger.warning(f"{self._storage.url()} is held by {holder}; waiting {EXPIRY:g} s for a renewal.")
        deadline = time.monotonic() + EXPIRY
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PERIOD / 2))
            now = self._read()
            if now is None:
                return
            if now != lease:
                raise _taken_error(self._storage.url(), parse(now))

    def _renew(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self.check()
                self._writer = replace(self._writer, count=self._writer.count + 1)
                self._storage.write_json(LEASE, asdict(self._writer))
            except UserError:
                return  # the next save raises the same error
            except Exception as error:  # each remote file system has different error classes; the store may come back
                logger.debug(f"The lease of {self._storage.url()} cannot be renewed: {error}")

    def check(self) -> None:
        """Verify that this process holds the lease; a lease that was removed is written again. See `Claim.check`."""
        content = self._read()
        if content is None:
            logger.warning(f"{self._storage.url(LEASE)} was removed while the run wrote there; the run recreated it.")
            self._storage.create_json(LEASE, asdict(self._writer))
            content = self._read()
        holder = parse(content) if content is not None else None
        if holder is None or holder.token != self._writer.token:
            raise _taken_error(self._storage.url(), holder)

    def release(self) -> None:
        """Stop the renewals and remove the lease."""
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a lease that remains expires
            self.check()
            self._storage.remove(LEASE)
