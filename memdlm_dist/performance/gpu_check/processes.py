"""Child processes with a time limit; no descendant keeps running after it."""

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

# Seconds between SIGINT, on which pytest and torchrun finish their files, and SIGKILL.
GRACE = 10.0
# Environment variable that marks the descendants of a command. A process group does not contain all of them, because
# torchrun starts a session for each worker.
_MARK = "MEMDLM_GPU_CHECK"
# Ctrl-C, termination by a batch system, and a lost connection.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TimeLimit(Exception):
    """Exception of a command that was ended at its time limit."""


@contextlib.contextmanager
def on_interrupt(handler: Callable[..., Any]) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP with `handler`; ignored signals stay ignored, as under nohup."""
    previous = {number: signal.getsignal(number) for number in _INTERRUPTS}
    handled = [number for number in _INTERRUPTS if previous[number] != signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
) -> tuple[int, str]:
    """Run a command and append its output to a log; return its exit status and its output.

    Args:
        seconds: time limit, at which the command and all its descendants are ended.
        folder: working directory.
        environment: variables to add to this process's environment.

    Raises:
        TimeLimit: If the command reached the time limit.
        KeyboardInterrupt: On an interrupt, after all descendants have ended.
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
            start_new_session=True,  # the terminal's Ctrl-C must reach only this process
            text=True,
        )
        try:
            process.communicate(stdin, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TimeLimit from None
        finally:
            interrupts: list[int] = []
            with on_interrupt(
                lambda number, frame: interrupts.append(number)
            ):  # an exception here would leave processes running
                _end(process, mark)
            if interrupts:
                raise KeyboardInterrupt
        out.seek(start)
        return process.returncode, out.read().decode(errors="replace")


def _end(process: subprocess.Popen[str], mark: str) -> None:
    """End a command and its descendants: SIGINT first, SIGKILL after GRACE seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        deadline = time.monotonic() + GRACE
        for pid in _marked(mark):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while _marked(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a killed process may wait in a driver
        process.wait(timeout=GRACE)


def _marked(mark: str) -> list[int]:
    """Return the ids of running processes with a mark in their environment; a zombie has no environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{_MARK}={mark}".encode() in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:  # the process has ended or belongs to another user
            continue
    return pids
