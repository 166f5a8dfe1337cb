"""One section of the check: what it works with while it runs commands, and how it ends."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memdlm_dist.performance.gpu_check import processes


class Failure(Exception):
    """A command of a section failed, or its result makes no sense."""


class OutOfMemory(Failure):
    """A command needed more memory than the device has."""


class Skip(Exception):
    """A section cannot run here."""


@dataclass
class Context:
    """What a running section works with: the machine, its folders, its time, and the numbers that it has so far."""

    root: Path  # of the repository
    output: Path  # of the check
    log: Path
    environment: dict[str, Any]  # from environment.py
    debug: bool
    quick: bool
    deadline: float  # by time.monotonic()
    numbers: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def devices(self) -> int:
        """Number of processes that a command starts: one for each device, and one without any."""
        return len(self.environment["devices"]) or 1

    @property
    def remaining(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def scratch(self) -> Path:
        """Folder of what sections prepare for each other; debug sizes have their own."""
        return self.output / ("debug" if self.debug else "runs")

    def status(self, *command: str, stdin: str = "") -> tuple[int, str]:
        """Run a command from the repository's root; returns its exit status and its output.

        Raises:
            processes.TimeLimit: at the section's deadline.
        """
        said = shlex.join(command).replace(sys.executable, "python").replace(f"{self.root}/", "")
        self.commands.append(f"NGPU={self.devices} {said}" if command[0] == "bash" else said)
        # launch/train.sh takes the interpreter of an activated environment: this one, not .venv's.
        environment = {"VIRTUAL_ENV": sys.prefix, "NGPU": str(self.devices)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        return processes.run(command, self.log, max(0.0, self.remaining), self.root, environment, stdin)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command; returns its output.

        Raises:
            Failure: if its exit status is not 0.
            processes.TimeLimit: at the section's deadline.
        """
        status, output = self.status(*command, stdin=stdin)
        if status != 0:
            kind = OutOfMemory if "OutOfMemoryError" in output or "out of memory" in output else Failure
            raise kind(f"{_name(command)} ended with status {status}: {last_words(output)}")
        return output

    def python(self, tool: str, *arguments: str, stdin: str = "") -> str:
        """Run a Python file or module (`-m`) with this interpreter; see `run`."""
        return self.run(sys.executable, tool, *arguments, stdin=stdin)


@dataclass(frozen=True)
class Section:
    """One part of the check."""

    name: str
    purpose: str
    run: Callable[[Context], None]  # fills Context.numbers; raises Failure or Skip
    headline: Callable[[dict[str, Any]], str]  # the key figure of its numbers
    needs_device: bool = False
    least: float = 60.0  # seconds below which it is not worth starting


def _name(command: Sequence[str]) -> str:
    return next((Path(word).name for word in command[1:] if not word.startswith("-")), command[0])


def last_words(output: str) -> str:
    """Return the line of an output that most likely says why a command failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for sign in ("error: ", "Error: ", "Error"):
        told = [line for line in lines if sign in line]
        if told:
            return told[-1][-300:]
    return lines[-1][-300:] if lines else "no output"


def read_json(path: Path) -> Any:
    """Return what a command wrote.

    Raises:
        Failure: if that is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{path.name} holds no result ({error})") from None
