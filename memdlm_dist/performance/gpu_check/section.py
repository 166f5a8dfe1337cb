"""Section of the check: its definition, the context that it runs in, and the exceptions that end it."""

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
    """Exception of a section whose command failed or wrote an invalid result."""


class OutOfMemory(Failure):
    """Exception of a command that ran out of device memory."""


class Skip(Exception):
    """Exception of a section that cannot run on this machine."""


@dataclass
class Context:
    """Context of a running section: machine, folders, deadline, commands, and the numbers measured so far."""

    root: Path  # the repository
    output: Path  # output folder of the check
    log: Path
    environment: dict[str, Any]  # from environment.py
    debug: bool
    quick: bool
    deadline: float  # on the clock time.monotonic()
    numbers: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def devices(self) -> int:
        """Number of processes that a command starts: one per device, or one on a CPU."""
        return len(self.environment["devices"]) or 1

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    @property
    def scratch(self) -> Path:
        """Folder for data and runs that sections share; debug sizes have a separate one."""
        return self.output / ("debug" if self.debug else "runs")

    def status(self, *command: str, stdin: str = "") -> tuple[int, str]:
        """Run a command from the repository's root; return its exit status and its output.

        Raises:
            processes.TimeLimit: At the section's deadline.
        """
        line = shlex.join(command).replace(sys.executable, "python").replace(f"{self.root}/", "")
        self.commands.append(f"NGPU={self.devices} {line}" if command[0] == "bash" else line)
        # VIRTUAL_ENV makes launch/train.sh use this process's interpreter instead of .venv's.
        environment = {"VIRTUAL_ENV": sys.prefix, "NGPU": str(self.devices)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        return processes.run(command, self.log, max(0.0, self.remaining), self.root, environment, stdin)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command and return its output.

        Raises:
            Failure: if its exit status is not 0; OutOfMemory if device memory was the reason.
            processes.TimeLimit: At the section's deadline.
        """
        status, output = self.status(*command, stdin=stdin)
        if status != 0:
            kind = OutOfMemory if "OutOfMemoryError" in output or "out of memory" in output else Failure
            raise kind(f"{_name(command)} ended with status {status}: {last_words(output)}")
        return output

    def python(self, tool: str, *arguments: str, stdin: str = "") -> str:
        """Run a Python file or module (`-m`) with this interpreter and return its output, as `run` does."""
        return self.run(sys.executable, tool, *arguments, stdin=stdin)


@dataclass(frozen=True)
class Section:
    """Definition of one section of the check."""

    name: str
    purpose: str
    run: Callable[[Context], None]  # fills Context.numbers; raises Failure or Skip
    headline: Callable[[dict[str, Any]], str]  # returns the key figure of its numbers
    needs_device: bool = False
    least: float = 60.0  # the section does not start with fewer seconds left


def _name(command: Sequence[str]) -> str:
    """Return the name of a command's script or module."""
    return next((Path(word).name for word in command[1:] if not word.startswith("-")), command[0])


def last_words(output: str) -> str:
    """Return the line of an output that most likely names the error: the last with "error", else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for sign in ("error: ", "Error: ", "Error"):
        matches = [line for line in lines if sign in line]
        if matches:
            return matches[-1][-300:]
    return lines[-1][-300:] if lines else "no output"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that a command wrote.

    Raises:
        Failure: if the file is missing or not valid JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{path.name} holds no result ({error})") from None
