"""Child processes with a time limit, of which nothing is left running."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Seconds from an interrupt, on which pytest and torchrun finish what they write, to SIGKILL.
GRACE = 10.0
# Environment variable by which the descendants of a command are found: torchrun starts a session for each worker, so
# a process group does not hold them all.
_MARK = "MEMDLM_GPU_CHECK"


# Ctrl-C, a batch system's end, and a connection that is lost.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TimeLimit(Exception):
    """A command was ended at its time limit."""


@contextlib.contextmanager
def on_interrupt(handler: Callable[..., Any]) -> Iterator[None]:
    """Handle the signals that interrupt, but those that are ignored, as nohup has it."""
    previous = {number: signal.getsignal(number) for number in _INTERRUPTS}
    heard = [number for number in _INTERRUPTS if previous[number] != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, previous[number])


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
) -> tuple[int, str]:
    """Run a command; returns its exit status and its output, which is appended to a log.

    Args:
        seconds: limit after which the command and all its descendants are ended.
        folder: where it runs.
        environment: variables besides this process's.

    Raises:
        TimeLimit: if it took longer.
    """
    mark = uuid.uuid4().hex
    with log.open("a+b") as out:
        out.write(f"$ {shlex.join(command)}\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {}), _MARK: mark},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C is for this process
            text=True,
        )
        try:
            process.communicate(stdin, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeLimit from None
        finally:
            interrupts: list[int] = []
            with on_interrupt(lambda number, frame: interrupts.append(number)):  # or some would be left running
                _end(process, mark)
            if interrupts:
                raise KeyboardInterrupt
        out.seek(start)
        return process.returncode, out.read().decode(errors="replace")


def _end(process: subprocess.Popen[str], mark: str) -> None:
    """End what is left of a command and its descendants."""
    for number in (signal.SIGINT, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        for pid in _marked(mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while _marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold a killed process
        process.wait(timeout=GRACE)


def _marked(mark: str) -> list[int]:
    """Return the running processes with a mark in their environment; a zombie has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # gone, or another user's
            continue
    return found
