"""Stop requests: after SIGTERM or SIGUSR1 a run finishes the current or the next step, saves and exits."""

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
# EX_TEMPFAIL of sysexits.h (try again): exit status of a stopped run, with and without the launch scripts.
EXIT_STATUS = 75
# Environment variable with the path of the launcher's status file. torchrun restarts workers that do not exit with 0,
# so a stopped worker writes its status to that file instead.
STATUS_FILE = "MEMDLM_STATUS_FILE"
# A batch system signals every process of a job, and the launcher forwards its signal to the workers. Signals that a
# worker receives within this many seconds are one request.
ONE_REQUEST_SECONDS = 1.0


class StopRequest:
    """Stop request of this process. A second signal, later than `ONE_REQUEST_SECONDS`, exits at once.

    Python runs signal handlers between two bytecodes of the main thread, which may be blocked in a collective. Python
    writes to the wake-up file descriptor at once, however, and a separate thread reads from it.

    Attributes:
        requested: True after the first signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0

    def __enter__(self) -> "StopRequest":
        """Install the signal handlers; call in the main thread."""
        read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(read_fd,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._write_fd)

    def _listen(self, read_fd: int) -> None:
        while received := os.read(read_fd, 64):
            for number in received:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
        os.close(read_fd)

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
    """Ignore `SIGNALS` outside of a `StopRequest`, so that a late signal does not fail a completed run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def exiting_on_sigterm(kept: str) -> Iterator[None]:
    """Raise SystemExit at SIGTERM, so that a command ends as it does after an error.

    Args:
        kept: sentence for the user about what is kept, without a period.
    """
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the removal
        received.append(number)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        if received:  # not printed in the handler, which may have interrupted another print
            print(f"Received SIGTERM: {kept}.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Defer SIGTERM and SIGINT until the context ends; no effect outside of the main thread.

    Blocking them is not enough: another thread may receive the signal, and Python still runs the handler in the main
    thread.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread runs handlers
        yield
        return
    received: list[int] = []
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Block SIGTERM in processes started in this context, until they call `outlive_first_sigterm`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def outlive_first_sigterm() -> None:
    """Ignore the first SIGTERM; call in a loader worker.

    The rank decides when its workers end, and sends them a second SIGTERM if necessary.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)

    signal.set_wakeup_fd(-1)  # the inherited one would report this worker's signals to the rank's `StopRequest`
    signal.signal(signal.SIGTERM, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def starting_waiters() -> Iterator[None]:
    """Block `SIGNALS` in processes that this thread starts in this context; each must call `outlive_stop_request`."""
    resource_tracker.ensure_running()  # multiprocessing unblocks SIGTERM when it starts its resource tracker
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def outlive_stop_request() -> None:
    """Ignore the first stop request; call in a process whose rank waits for its end.

    The process exits at a signal from its rank, or at a second signal later than `ONE_REQUEST_SECONDS`. `SIGNALS` stay
    blocked in all threads; the thread started here waits for them.
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
    """Return the exit status of a stopped run: 0 under the launcher, which reads `EXIT_STATUS` from its status file."""
    if status_file := os.environ.get(STATUS_FILE):
        Path(status_file).write_text(str(EXIT_STATUS))
        return 0
    return EXIT_STATUS
