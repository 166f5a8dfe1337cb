"""Hang detector: names the rank that blocks the others.

A collective that never completes does not tell which rank is missing. So every rank publishes its status in the
rendezvous store: its phase, the line of code that it executes, and how many collectives it has started. The rank that
waits longest reads the statuses of all ranks, names the missing rank and exits. Clocks of different nodes are never
compared: the reading rank measures the age of a status with its own clock.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from memdlm_dist.compat.torch import collectives, rendezvous_store
from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.runtime.device import device_type

logger = logging.getLogger()

# Fractions of the collectives' timeout. After PATIENCE the watchdog reports a hang: a little before the collective
# itself times out, which on some backends ends the process. After OBSERVATION it starts to read the other ranks'
# statuses, to see which of them make progress.
PATIENCE, OBSERVATION = 0.85, 0.4


@dataclass(frozen=True)
class RankStatus:
    """Status that a rank publishes.

    Attributes:
        rank: global rank.
        node: host name.
        process: process id.
        progress: number of phases entered. All ranks enter the same phases, so a rank with a lower number is behind.
        doing: current phase, in words.
        line: file, line and function that the main thread executes, or the thread that the main thread waits for.
        in_collective: True if this line is in torch.distributed or called from it.
        still: seconds since the line last changed or the thread was last seen computing.
        beat: number of statuses that the rank has published.
        begun: number of collectives started in all process groups; -1 if the backend does not count them.
        silent: seconds since the beat last changed, on the reading rank's clock.
    """

    rank: int
    node: str
    process: int
    progress: int
    doing: str
    line: str
    in_collective: bool
    still: float
    beat: int
    begun: int = -1
    silent: float = 0.0


class Watchdog:
    """Thread that publishes this rank's status and detects that the rank waits for others for too long.

    Args:
        rank: global rank of this process.
        world_size: number of ranks.
        store: torch.distributed store, with a connection that nothing else uses.
        timeout: timeout of the collectives in seconds.
        on_hang: called once, in the watchdog's thread, with the explanation.
    """

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float, on_hang: Callable[[str], None]):
        self.timeout = timeout
        self._rank, self._world_size, self._store, self._on_hang = rank, world_size, store, on_hang
        self._main_thread = self._working_thread = threading.main_thread().ident
        self._progress, self._doing, self._needs_others = 0, "starting", False
        self._beat = 0
        self._last_beats: dict[int, tuple[int, float]] = {}  # rank -> its last beat, time when that was first read
        self._position: tuple[Any, ...] = ()  # progress, line and stack depth, unchanged since `_still_since`
        self._still_since = self._sampled_at = time.monotonic()
        self._cpu_time = 0.0  # the main thread's, at `_sampled_at`
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def at(self, doing: str, needs_others: bool = True, waits_for: int | None = None) -> None:
        """Enter a new phase; call from the main thread.

        Args:
            doing: the phase, in words.
            needs_others: True if the phase has collectives, so that a missing rank blocks this one.
            waits_for: identifier of the thread that the main thread waits for; that thread's line is published instead.
        """
        self._progress, self._doing, self._needs_others = self._progress + 1, doing, needs_others
        self._working_thread = waits_for or self._main_thread

    @property
    def doing(self) -> str:
        """Current phase, in words."""
        return self._doing

    def stop(self) -> None:
        """Stop the thread and wait for its end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _period(self) -> float:
        """Seconds between two accesses to the store, which all ranks share."""
        return min(max(self.timeout / 20, 0.2), 5.0)

    def _watch(self) -> None:
        published = looked = -1e9
        while not self._stopped.wait(0.2):
            try:
                if time.monotonic() - published > self._period:
                    published = time.monotonic()
                    self._beat += 1
                    self._store.set(_key(self._rank), json.dumps(asdict(self._status())))
                still = self._status().still if self._needs_others else 0.0
                if still > OBSERVATION * self.timeout and time.monotonic() - looked > self._period:
                    looked = time.monotonic()
                    if self._is_other_at_fault() and still > PATIENCE * self.timeout:
                        self._on_hang(self.explain())
                        return
            except Exception as error:  # the store ends with its node, or with the run
                logger.debug(f"The watchdog cannot reach the store: {error}")

    def _status(self) -> RankStatus:
        """Return this rank's current status."""
        line, in_collective, depth = _innermost_line(sys._current_frames().get(self._working_thread or 0))
        now = time.monotonic()
        position = (self._progress, line, depth)
        if self._is_computing(now) or position != self._position:
            self._position, self._still_since = position, now
        still = now - self._still_since
        return RankStatus(
            self._rank, socket.gethostname(), os.getpid(), self._progress, self._doing, line, in_collective, still,
            self._beat, sum(begun for begun, _ in counts) if (counts := collectives()) else -1,
        )  # fmt: skip

    def _is_computing(self, now: float) -> bool:
        """Return whether the main thread has used CPU time since the last sample; always False with an accelerator.

        A thread that waits for an accelerator may spin, so its CPU time proves nothing.
        """
        if self._main_thread is None or device_type() != "cpu":
            return False
        cpu_time, previous = time.clock_gettime(time.pthread_getcpuclockid(self._main_thread)), self._cpu_time
        elapsed, self._sampled_at, self._cpu_time = now - self._sampled_at, now, cpu_time
        return cpu_time - previous > 0.2 * elapsed

    def _is_other_at_fault(self) -> bool:
        """Return whether another rank blocks this one; a long step in which all ranks compute is not a hang."""
        statuses, unknown = self._all_statuses()
        return bool(unknown or missing(statuses, self._silence))

    def explain(self) -> str:
        """Return one sentence: the missing rank, its phase and line, and where the others wait."""
        return explanation(*self._all_statuses(), self._silence)

    @property
    def _silence(self) -> float:
        """Seconds after which a rank without a new beat is silent; less than the time from OBSERVATION to PATIENCE."""
        return min(3 * self._period + 1, (PATIENCE - OBSERVATION) * self.timeout - self._period)

    def _all_statuses(self) -> tuple[list[RankStatus], list[int]]:
        """Read the statuses of all ranks, this rank's first, and list the ranks that have never published one."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        unknown = []
        if others and not self._store.check([_key(rank) for rank in others]):
            unknown = [rank for rank in others if not self._store.check([_key(rank)])]
        known = [_key(rank) for rank in others if rank not in unknown]
        contents = self._store.multi_get(known) if known else []
        return [self._status(), *(self._with_silence(RankStatus(**json.loads(text))) for text in contents)], unknown

    def _with_silence(self, status: RankStatus) -> RankStatus:
        """Return the status with `silent` set by this rank's clock."""
        beat, since = self._last_beats.get(status.rank, (-1, 0.0))
        if beat != status.beat:
            since = time.monotonic()
            self._last_beats[status.rank] = status.beat, since
        return replace(status, silent=time.monotonic() - since)


def missing(statuses: Sequence[RankStatus], silence: float) -> list[RankStatus]:
    """Find the ranks that the waiting rank waits for.

    Args:
        statuses: the waiting rank's status, then those of the other ranks.
        silence: seconds without a new beat after which a rank counts as stopped or lost.

    Returns:
        The silent ranks; else the ranks in an earlier phase; else the ranks that have been still for about as long as
        the waiting rank, and have not reached the collective in which it waits.
    """
    waiting, *others = statuses
    silent = [status for status in others if status.silent > silence]
    behind = [status for status in others if status.progress < waiting.progress]
    resting = [
        status for status in others if status.still > 0.8 * waiting.still - silence and _is_elsewhere(status, waiting)
    ]
    return silent or behind or resting


def _is_elsewhere(status: RankStatus, waiting: RankStatus) -> bool:
    """Return whether a rank has not reached the collective in which the waiting rank waits.

    An accelerator's collectives return at once, and the line at which a main thread waits tells little. There the
    numbers of started collectives decide.
    """
    if waiting.begun >= 0 and status.begun >= 0:
        return status.begun < waiting.begun
    return not status.in_collective and status.line != waiting.line


def explanation(statuses: Sequence[RankStatus], unknown: Sequence[int], silence: float) -> str:
    """Return one sentence on why the waiting rank makes no progress.

    Args:
        statuses: see `missing`.
        unknown: ranks that have never published a status.
        silence: see `missing`.
    """
    waiting = statuses[0]
    head = f"No progress for {waiting.still:.0f} s while {waiting.doing}: "
    remedy = "see that rank's log and node (comm.train_timeout_seconds sets how long the others wait)."
    if unknown:
        return f"{head}{_ranks(unknown)} never reported a status; {remedy}"
    absent, others = missing(statuses, silence), []
    if not absent:
        return f"{head}all ranks wait in {waiting.doing} ({waiting.line}): the network or a device may be at fault."
    for status in absent:
        silent = status.silent > silence
        verb = "was last seen" if silent else "is"
        age = f", silent for {status.silent:.0f} s" if silent else ""
        others.append(
            f"rank {status.rank} (node {status.node}, process {status.process}{age}) {verb} {status.doing} "
            f"({status.line})"
        )
    waiting_ranks = [status.rank for status in statuses if status not in absent]
    where = f"{waiting.doing} ({waiting.line})"
    return f"{head}{'; '.join(others)}, while {_ranks(waiting_ranks)} waited in {where}; {remedy}"


def _ranks(numbers: Sequence[int]) -> str:
    """Format a list of ranks, such as "ranks 0, 1"; at most 8 are listed."""
    listed = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {listed}"


def _innermost_line(frame: FrameType | None) -> tuple[str, bool, int]:
    """Return a stack's innermost line, whether torch.distributed is or calls this line, and the stack's depth."""
    line, depth, in_collective = "", 0, False
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        line = line or f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} in {name}"
        # Only the 3 innermost frames: FSDP2 also calls the model's forward pass, in which the rank computes.
        in_collective |= depth < 3 and "/torch/distributed/" in path
        frame, depth = frame.f_back, depth + 1
    return line, in_collective, depth


def _key(rank: int) -> str:
    return f"memdlm/place/{rank}"


def start_watchdog(timeout: float) -> Watchdog:
    """Start a watchdog that prints the explanation of a hang and ends the process with `EXIT_STATUS`.

    Args:
        timeout: timeout of the collectives in seconds.
    """

    def end(explanation: str) -> None:
        # The console shows local rank 0 only; the launcher reads the message of other ranks from torchrun's error file.
        get_error_handler().record_exception(UserError(explanation))
        print(f"error: {explanation}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_STATUS)

    # A separate connection: the process group's connection may be blocked.
    watchdog = Watchdog(dist.get_rank(), dist.get_world_size(), rendezvous_store(), timeout, end)
    watchdog.start()
    return watchdog
