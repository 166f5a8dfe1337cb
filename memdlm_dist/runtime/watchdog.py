"""Hang detector: names the rank that blocks the others.

A collective that never ends says nothing of the rank that did not come. So every rank tells the others, through the
store of their rendezvous, where it is: what it is doing, in which line of code, how many collectives it has begun. The
rank that has waited longest reads that, names who is missing, and ends. Two nodes' clocks are never compared: what a
rank says is timed by the clock of the one that reads it.
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

# The watchdog speaks a little before the collective itself gives up, which on some backends ends the process. It looks
# at the others from earlier on, to see who moves. Shares of the collectives' timeout.
PATIENCE, OBSERVATION = 0.85, 0.4


@dataclass(frozen=True)
class RankStatus:
    """Where a rank is.

    Attributes:
        progress: how many places it has been at. All ranks go through the same ones, so the least is behind.
        doing: what, in words.
        line: file, line and function of the main thread, or of the one that it waits for.
        in_collective: whether that is inside of torch.distributed.
        still: seconds since that line last changed, or was last seen computing.
        beat: how often the rank has said where it is.
        begun: collectives that were begun, of all process groups; -1 if the backend does not count them.
        silent: seconds since another beat came, on the clock of the rank that listens.
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
    """A thread that publishes where this rank is and notices when it waits for others for too long.

    Args:
        rank, ranks: of the world.
        store: torch.distributed's, a connection of its own.
        timeout: of the collectives (s).
        on_hang: called once with the explanation.
    """

    def __init__(self, rank: int, ranks: int, store: Any, timeout: float, on_hang: Callable[[str], None]):
        self.timeout = timeout
        self._rank, self._ranks, self._store, self._on_hang = rank, ranks, store, on_hang
        self._main = self._working = threading.main_thread().ident
        self._progress, self._doing, self._needs_others = 0, "starting", False
        self._beat = 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was first seen
        self._spot: tuple[Any, ...] = ()  # where the main thread is, and since when
        self._since = self._seen = time.monotonic()
        self._used = 0.0  # its CPU time when it was last seen
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        self._thread.start()

    def at(self, doing: str, needs_others: bool = True, waits_for: int | None = None) -> None:
        """The rank has come to something new.

        Args:
            needs_others: it cannot go on if another rank does not come.
            waits_for: the thread of this process that the main thread waits for, whose line is then the rank's.
        """
        self._progress, self._doing, self._needs_others = self._progress + 1, doing, needs_others
        self._working = waits_for or self._main

    @property
    def doing(self) -> str:
        return self._doing

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _period(self) -> float:
        """Seconds between two messages to the store: many ranks write to one."""
        return min(max(self.timeout / 20, 0.2), 5.0)

    def _watch(self) -> None:
        published = looked = -1e9
        while not self._stopped.wait(0.2):
            try:
                if time.monotonic() - published > self._period:
                    published = time.monotonic()
                    self._beat += 1
                    self._store.set(_key(self._rank), json.dumps(asdict(self._here())))
                still = self._here().still if self._needs_others else 0.0
                if still > OBSERVATION * self.timeout and time.monotonic() - looked > self._period:
                    looked = time.monotonic()
                    if self._culprits() and still > PATIENCE * self.timeout:
                        self._on_hang(self.explain())
                        return
            except Exception as error:  # the store goes down with the node that has it, or at the end
                logger.debug(f"The watchdog cannot reach the store: {error}")

    def _here(self) -> RankStatus:
        line, in_collective, depth = _where(sys._current_frames().get(self._working or 0))
        now = time.monotonic()
        spot = (self._progress, line, depth)
        if self._computes(now) or spot != self._spot:
            self._spot, self._since = spot, now
        still = now - self._since
        return RankStatus(
            self._rank, socket.gethostname(), os.getpid(), self._progress, self._doing, line, in_collective, still,
            self._beat, sum(begun for begun, _ in counts) if (counts := collectives()) else -1,
        )  # fmt: skip

    def _computes(self, now: float) -> bool:
        """Return whether the main thread computes in one line; on a CPU alone, since who waits for an accelerator
        may spin."""
        if self._main is None or device_type() != "cpu":
            return False
        used, before = time.clock_gettime(time.pthread_getcpuclockid(self._main)), self._used
        elapsed, self._seen, self._used = now - self._seen, now, used
        return used - before > 0.2 * elapsed

    def _culprits(self) -> bool:
        """Return whether another rank is at fault: a long step, in which all are at work, is not a hang."""
        places, unknown = self._everyone()
        return bool(unknown or missing(places, self._silence))

    def explain(self) -> str:
        """One sentence: which rank is missing, where it is, and where the others wait."""
        return explanation(*self._everyone(), self._silence)

    @property
    def _silence(self) -> float:
        # No longer than others are observed before one is named.
        return min(3 * self._period + 1, (PATIENCE - OBSERVATION) * self.timeout - self._period)

    def _everyone(self) -> tuple[list[RankStatus], list[int]]:
        """The places of all ranks, this one first; and the ranks that have never said where they are."""
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        unknown = []
        if others and not self._store.check([_key(rank) for rank in others]):
            unknown = [rank for rank in others if not self._store.check([_key(rank)])]
        known = [_key(rank) for rank in others if rank not in unknown]
        found = self._store.multi_get(known) if known else []
        return [self._here(), *(self._timed(RankStatus(**json.loads(place))) for place in found)], unknown

    def _timed(self, place: RankStatus) -> RankStatus:
        """Add for how long a rank has been silent."""
        beat, since = self._heard.get(place.rank, (-1, 0.0))
        if beat != place.beat:
            since = time.monotonic()
            self._heard[place.rank] = place.beat, since
        return replace(place, silent=time.monotonic() - since)


def missing(places: Sequence[RankStatus], silence: float) -> list[RankStatus]:
    """Find the ranks that the first one waits for: silent, or behind it, or at rest where the others have gone on.

    Args:
        places: of the rank that waits first, then of the others.
        silence: seconds after which a rank that says nothing is stopped or gone.
    """
    here, *others = places
    silent = [place for place in others if place.silent > silence]
    behind = [place for place in others if place.progress < here.progress]
    resting = [place for place in others if place.still > 0.8 * here.still - silence and _is_elsewhere(place, here)]
    return silent or behind or resting


def _is_elsewhere(place: RankStatus, here: RankStatus) -> bool:
    """Return whether a rank has not come to the collective that `here` waits in.

    An accelerator's collectives return at once, and a main thread that waits for one says little: then their numbers
    tell.
    """
    if here.begun >= 0 and place.begun >= 0:
        return place.begun < here.begun
    return not place.in_collective and place.line != here.line


def explanation(places: Sequence[RankStatus], unknown: Sequence[int], silence: float) -> str:
    """What the places of all ranks say; for the arguments see `missing`.

    Args:
        unknown: ranks that have never said where they are.
    """
    here = places[0]
    head = f"No progress for {here.still:.0f} s while {here.doing}: "
    remedy = "see that rank's log and node (comm.train_timeout_seconds sets how long the others wait)."
    if unknown:
        return f"{head}{_ranks(unknown)} never came; {remedy}"
    absent, others = missing(places, silence), []
    if not absent:
        return f"{head}all ranks wait in {here.doing} ({here.line}): the network or a device may be at fault."
    for place in absent:
        silent = place.silent > silence
        last = "was last seen" if silent else "is"
        quiet = f", silent for {place.silent:.0f} s" if silent else ""
        others.append(
            f"rank {place.rank} (node {place.node}, process {place.process}{quiet}) {last} {place.doing} ({place.line})"
        )
    waiting = [place.rank for place in places if place not in absent]
    where = f"{here.doing} ({here.line})"
    return f"{head}{'; '.join(others)}, while {_ranks(waiting)} waited in {where}; {remedy}"


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _where(frame: FrameType | None) -> tuple[str, bool, int]:
    """The innermost line of a stack, whether it is one of torch.distributed or called by it, and the stack's depth."""
    line, depth, in_collective = "", 0, False
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        line = line or f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} in {name}"
        # Further out the model's forward pass is inside of FSDP2 as well, when it computes.
        in_collective |= depth < 3 and "/torch/distributed/" in path
        frame, depth = frame.f_back, depth + 1
    return line, in_collective, depth


def _key(rank: int) -> str:
    return f"memdlm/place/{rank}"


def start_watchdog(timeout: float) -> Watchdog:
    """The watchdog of this process, which ends it when it hangs."""

    def end(explanation: str) -> None:
        # The launcher shows local rank 0; what another rank says reaches it through torchrun's error file.
        get_error_handler().record_exception(UserError(explanation))
        print(f"error: {explanation}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT_STATUS)

    # A connection of its own: the other one may be waiting for something.
    watchdog = Watchdog(dist.get_rank(), dist.get_world_size(), rendezvous_store(), timeout, end)
    watchdog.start()
    return watchdog
