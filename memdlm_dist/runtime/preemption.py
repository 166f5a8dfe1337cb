"""Being asked to stop: SIGTERM or SIGUSR1 end a run after the step that it is in, or the next, saved."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

logger = logging.getLogger()

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# sysexits.h's EX_TEMPFAIL: try again. What the launch scripts, and a run without them, exit with.
EXIT_STATUS = 75
# The launcher names a file here: torchrun restarts workers that do not exit with 0, so the status goes there.
STATUS_FILE = "MEMDLM_STATUS_FILE"
# Batch systems signal every process of a job, and the launcher its workers besides: that is one request.
ONE_REQUEST_SECONDS = 1.0


class StopRequest:
    """Whether this process was asked to stop. A second signal, later than `ONE_REQUEST_SECONDS`, exits at once.

    Python runs its handlers between two bytecodes of the main thread, which may be waiting for another rank inside
    a collective. Its wake-up file descriptor is written to at once, and a thread of ours reads it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> "StopRequest":
        """Take over the signals; in the main thread only."""
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._wakeup = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(reads,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writes)

    def _listen(self, reads: int) -> None:
        while received := os.read(reads, 64):
            for number in received:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
        os.close(reads)

    def _receive(self, number: signal.Signals) -> None:
        if not self.requested:
            self._first, self.requested = time.monotonic(), True
            logger.info(
                f"Received {number.name}: finishing a step, then saving and exiting with status {EXIT_STATUS}; "
                "a second signal exits at once."
            )
        elif time.monotonic() - self._first > ONE_REQUEST_SECONDS:
            print(f"Received {number.name} again: exiting at once, without saving.", file=sys.stderr, flush=True)
            os._exit(128 + number)


def ignore_outside_of_training() -> None:
    """In a training program, before and after `StopRequest`: a signal that comes late does not undo a good end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as an error does, so that it removes what it has not finished."""

    received: list[int] = []

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # the removal is not to be cut short
        received.append(number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:  # not in the handler, which may have interrupted another print
            print("Received SIGTERM: what was unfinished is removed.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT that arrive meanwhile afterwards.

    Blocking them is not enough: another thread may receive them, and the main thread still runs the handler.
    """
    if threading.current_thread() is not threading.main_thread():  # which is the one that runs handlers
        yield
        return
    received: list[int] = []
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Processes that are started meanwhile have SIGTERM blocked until they call `outlive_first_sigterm`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def outlive_first_sigterm() -> None:
    """In a loader's worker: let the rank decide. It ends its workers itself, with another SIGTERM if need be."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)

    signal.set_wakeup_fd(-1)  # inherited: what this process receives would be its rank's
    signal.signal(signal.SIGTERM, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def starting_waiters() -> Iterator[None]:
    """Processes that this thread starts meanwhile have `SIGNALS` blocked until they call `outlive_stop_request`."""
    resource_tracker.ensure_running()  # multiprocessing unblocks SIGTERM when it starts this helper of its own
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_stop_request() -> None:
    """In a process that its rank waits for: ignore a request to stop, but not the rank's own signal or a second one.

    `SIGNALS` stay blocked in all threads, and one that is started here takes them.
    """
    threading.Thread(target=_outlive, daemon=True, name="signals").start()


def _outlive() -> None:
    first: float | None = None
    while True:
        received, now = signal.sigwaitinfo(SIGNALS), time.monotonic()
        if received.si_pid == os.getppid() or (first is not None and now - first > ONE_REQUEST_SECONDS):
            os._exit(128 + received.si_signo)
        first = now if first is None else first


def exit_status() -> int:
    """The status to exit with after a run that was asked to stop: 0 under our launcher, which is told."""
    if file := os.environ.get(STATUS_FILE):
        Path(file).write_text(str(EXIT_STATUS))
        return 0
    return EXIT_STATUS
