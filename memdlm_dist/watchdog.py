"""Who is waited for when a run stands still.

A collective that never ends says nothing of the rank that did not come. So every rank tells the others, through the
store of their rendezvous, where it is: what it is doing and in which line of code. The rank that has waited longest
reads that, names who is missing, and ends.
"""

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from memdlm_dist.errors import EXIT_STATUS, UserError

logger = logging.getLogger()

# The watchdog speaks a little before the collective itself gives up, which on some backends ends the process.
PATIENCE = 0.85


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        progress: how many places it has been at. All ranks go through the same ones, so the least is behind.
        doing: what, in words.
        line: file, line and function of the main thread.
        in_collective: whether that is inside of torch.distributed.
        beat: when this was written down, by the clock of its node (s).
    """

    rank: int
    node: str
    process: int
    progress: int
    doing: str
    line: str
    in_collective: bool
    beat: float


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
        self._main = threading.main_thread().ident
        self._progress, self._doing, self._needs_others, self._since = 0, "starting", False, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        self._thread.start()

    def at(self, doing: str, needs_others: bool = True) -> None:
        """The rank has come to something new. `needs_others`: it cannot go on if another rank does not come."""
        self._needs_others = needs_others
        self._progress, self._doing, self._since = self._progress + 1, doing, time.monotonic()

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
        published = -1e9
        while not self._stopped.wait(0.2):
            try:
                if time.monotonic() - published > self._period:
                    published = time.monotonic()
                    self._store.set(_key(self._rank), json.dumps(asdict(self._here())))
                waited = time.monotonic() - self._since
                if self._needs_others and waited > PATIENCE * self.timeout:
                    self._on_hang(self.explain())
                    return
            except Exception as error:  # the store goes down with the node that has it, or at the end
                logger.debug(f"The watchdog cannot reach the store: {error}")

    def _here(self) -> Place:
        line, in_collective = _where(sys._current_frames().get(self._main or 0))
        return Place(
            self._rank, socket.gethostname(), os.getpid(), self._progress, self._doing, line, in_collective, time.time()
        )

    def explain(self) -> str:
        """One sentence: which rank is missing, where it is, and where the others wait."""
        places, unknown = [self._here()], []
        for rank in range(self._ranks):
            if rank == self._rank:
                continue
            if self._store.check([_key(rank)]):
                places.append(Place(**json.loads(self._store.get(_key(rank)))))
            else:
                unknown.append(rank)
        return explanation(places, unknown, time.monotonic() - self._since, 3 * self._period + 1)


def explanation(places: Sequence[Place], unknown: Sequence[int], waited: float, silence: float) -> str:
    """What the places of all ranks say.

    Args:
        places: of this rank first, then of the others.
        unknown: ranks that have never said where they are.
        waited: seconds that this rank has waited.
        silence: seconds after which a rank that says nothing is stopped or gone.
    """
    here, now = places[0], places[0].beat
    silent = [place for place in places if now - place.beat > silence]
    furthest = max(place.progress for place in places)
    behind = [place for place in places if place.progress < furthest]
    elsewhere = [place for place in places if not place.in_collective]
    head = f"No progress for {waited:.0f} s while {here.doing}: "
    remedy = "see that rank's log and node (comm.train_timeout_seconds sets how long the others wait)."
    if unknown:
        return f"{head}{_ranks(unknown)} never came; {remedy}"
    missing, others = silent or behind or elsewhere, []
    if not missing or len(missing) == len(places):
        return f"{head}all ranks wait in {here.doing} ({here.line}): the network or a device may be at fault."
    for place in missing:
        last = "was last seen" if place in silent else "is"
        quiet = f", silent for {now - place.beat:.0f} s" if place in silent else ""
        others.append(
            f"rank {place.rank} (node {place.node}, process {place.process}{quiet}) {last} {place.doing} ({place.line})"
        )
    waiting = [place for place in places if place not in missing]
    where = f"{waiting[0].doing} ({waiting[0].line})"
    return f"{head}{'; '.join(others)}, while {_ranks([p.rank for p in waiting])} waited in {where}; {remedy}"


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of a stack, and whether it is one of torch.distributed, or called by it."""
    line, depth, in_collective = "", 0, False
    # Further out the model's forward pass is inside of FSDP2 as well, when it computes.
    while frame is not None and depth < 3:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        line = line or f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} in {name}"
        in_collective |= "/torch/distributed/" in path
        frame, depth = frame.f_back, depth + 1
    return line, in_collective


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

    store: Any = _get_default_store()
    store = store.clone()  # a connection of its own: the other one may be waiting for something
    watchdog = Watchdog(dist.get_rank(), dist.get_world_size(), store, timeout, end)
    watchdog.start()
    return watchdog


def connection_loss(error: RuntimeError) -> str:
    """Why a collective failed, if it did because another rank is gone or did not come in time; else empty."""
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return ""
    return re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
