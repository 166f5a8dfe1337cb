"""One writer a folder: a lock on disk, a lease object at a URL, so that two runs never rename each other's files.

A lock is the kernel's and ends with its process. A store has no locks: there the writer counts up in a small object,
and another job takes the folder only after it has seen the count stand still on its own clock. Clocks of two machines
are never compared.
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
# Seconds: how long a lease that nobody counts up still holds, how often its writer counts, how long two writers that
# come at once need to see each other's, how long the processes of a run that was killed may take to end.
EXPIRY, PERIOD, SETTLING, PATIENCE = 60.0, 10.0, 1.0, 10.0


@dataclass(frozen=True)
class Writer:
    """A run that writes to a folder.

    Attributes:
        job: the same for all attempts of a job.
        attempt: how often the batch system queued the job again, and how often the launcher restarted its processes.
        token: of this process alone.
        count: how often the lease was renewed.
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
    """Describe this process; its job is the launcher's, or it is a job of its own."""
    environment = os.environ
    node = socket.gethostname()
    attempt = tuple(int(environment.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Writer(environment.get(JOB) or f"{node}/{os.getpid()}", attempt, node, os.getpid(), now)


def parse(content: bytes) -> Writer | None:
    """Parse a lease, without what a later version may have added; None if it is not one."""
    try:
        values = {name: value for name, value in json.loads(content).items() if name in Writer.__dataclass_fields__}
        return Writer(**{**values, "attempt": tuple(values["attempt"])})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


class Claim(Protocol):
    """The right to write to a folder."""

    def check(self) -> None:
        """Look whether it still holds; call before every save and deletion.

        Raises:
            UserError: if another run has the folder.
            OSError: if the folder is not there, and may come back.
        """

    def release(self) -> None:
        """Let others write."""


def claim(location: str, writer: Writer) -> Claim:
    """Claim a folder or URL for a run.

    Raises:
        UserError: naming the run that has it, or the location if it cannot be reached.
    """
    try:
        if is_remote(location):
            return Lease(Storage(location), writer)
        try:
            return Lock(Path(location), writer)
        except _NoLocksError as error:
            logger.warning(f"The file system of {location} has no locks ({error}); a lease file takes their place.")
            return Lease(Storage(location), writer)
    except UserError:
        raise
    except Exception as error:  # every remote file system raises its own
        reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{location} cannot be written to ({reason}); see the file system or the store, or choose another folder."
        ) from None


@contextlib.contextmanager
def claimed(location: str, writer: Writer) -> Iterator[Claim]:
    """Hold the claim to a folder or URL in a context."""
    held = claim(location, writer)
    try:
        yield held
    finally:
        held.release()


def _taken(location: str, other: Writer | None) -> UserError:
    return UserError(
        f"Another run writes to {location}: {other or f'one whose {LEASE} cannot be read'}; end it, or choose another "
        "folder."
    )


class _NoLocksError(Exception):
    """The file system knows no locks."""


class Lock:
    """Claim to a folder on disk.

    A POSIX record lock: unlike flock's, children do not inherit it, so a loader worker that outlives its rank for some
    seconds does not hold it; and network file systems know it. It would end if this process opened and closed the
    file a second time.
    """

    def __init__(self, folder: Path, writer: Writer):
        self._folder, self._writer = folder, writer
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._device = os.stat(folder).st_dev
        self._checking = threading.Lock()  # retention removes in a thread of its own
        self._descriptor = self._acquire()

    def _acquire(self) -> int:
        """Return a descriptor of the file that is locked."""
        deadline = time.monotonic() + PATIENCE
        while True:
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    break
                os.close(descriptor)  # its writer has just released it, and removed it
                continue
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise _taken(str(self._folder), self._other()) from None
                time.sleep(0.2)
            except OSError as error:
                os.close(descriptor)
                raise _NoLocksError(error.strerror) from None
        (self._folder / LEASE).write_text(json.dumps(asdict(self._writer)) + "\n")
        return descriptor

    def _other(self) -> Writer | None:
        with contextlib.suppress(OSError):
            return parse((self._folder / LEASE).read_bytes())
        return None

    def _is_current(self, descriptor: int) -> bool:
        """Return whether the lock file in the folder is this one."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._folder / LOCK), os.fstat(descriptor))
        return False

    def check(self) -> None:
        with self._checking:
            if self._is_current(self._descriptor):
                return
            parent = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
            if os.stat(parent).st_dev != self._device:
                raise OSError(f"{self._folder} is on another file system than at the start of the run")
            self._folder.mkdir(parents=True, exist_ok=True)
            before, self._descriptor = self._descriptor, self._acquire()
            os.close(before)
            logger.warning(f"{self._folder} was removed or replaced while the run wrote to it; it is made anew.")

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if self._is_current(self._descriptor):
                for name in (LEASE, LOCK):
                    (self._folder / name).unlink(missing_ok=True)
                if self._made:
                    self._folder.rmdir()  # if nothing was saved
        os.close(self._descriptor)


class Lease:
    """Claim to a folder at a URL: an object that says whose it is, counted up by a thread."""

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
        found, value = self._read(), asdict(self._writer)
        if found is not None:
            held = parse(found)
            if held is not None and held.job == self._writer.job and held.attempt < self._writer.attempt:
                logger.info(f"Taking {self._storage.url()} over from an earlier attempt of this job, {held}.")
            else:
                self._watch(found)
            self._storage.write_json(LEASE, value)
        else:
            self._storage.create_json(LEASE, value)
        # A store without conditional writes keeps what was written last.
        time.sleep(SETTLING)
        self.check()

    def _watch(self, found: bytes) -> None:
        """Wait until another run's lease has stood still for `EXPIRY` seconds.

        Raises:
            UserError: if that run is alive.
        """
        holder = parse(found) or f"a run whose {LEASE} cannot be read"
        logger.info(f"{self._storage.url()} is held by {holder}; waiting {EXPIRY:g} s for a sign of life.")
        deadline = time.monotonic() + EXPIRY
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PERIOD / 2))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise _taken(self._storage.url(), parse(now))

    def _renew(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self.check()
                self._writer = replace(self._writer, count=self._writer.count + 1)
                self._storage.write_json(LEASE, asdict(self._writer))
            except UserError:
                return  # the next save says it
            except Exception as error:  # every remote file system raises its own; the store may come back
                logger.debug(f"The lease of {self._storage.url()} cannot be renewed: {error}")

    def check(self) -> None:
        content = self._read()
        if content is None:
            logger.warning(f"{self._storage.url(LEASE)} was removed while the run wrote there; it is made anew.")
            self._storage.create_json(LEASE, asdict(self._writer))
            content = self._read()
        found = parse(content) if content is not None else None
        if found is None or found.token != self._writer.token:
            raise _taken(self._storage.url(), found)

    def release(self) -> None:
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it expires by itself
            self.check()
            self._storage.remove(LEASE)
