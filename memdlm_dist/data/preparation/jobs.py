"""Jobs that workers do, and the files by which they report their progress."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.units import Unit
from memdlm_dist.data.shards import Card

RUNNING = "running"  # folder in the scratch folder with one file for each unit in progress
_PERIOD = 0.5  # seconds between two reports of progress


@dataclass(frozen=True)
class Job:
    """Work on one unit, as it is sent to a worker.

    Attributes:
        work: (location, fingerprint) of the work folder.
        tokenizer: folder or URL of the tokenizer.
        scratch: folder for unfinished shards and reports of progress.
        parallel: other workers are busy on the same machine.
        parent: process whose end ends the job; None if there is no such process on this machine.
    """

    config: PrepareConfig
    unit: Unit
    work: tuple[str, str]
    tokenizer: str
    card: Card
    scratch: str
    parallel: bool = False
    parent: int | None = None

    def begin(self) -> None:
        """Set up the worker process."""
        if self.parallel:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self.parent is not None:
            # A terminal sends Ctrl-C to the workers as well. The command alone answers it, and ends them.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _follow(self.parent)

    def check_parent(self) -> None:
        """End this process if the command that started it was killed: another one may be writing to the output."""
        if self.parent is not None and os.getppid() != self.parent:
            os._exit(1)


@cache
def _follow(parent: int) -> None:
    """End this process soon after its parent, even in the middle of a unit."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PERIOD)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


class ProgressMark:
    """File that tells how much of a unit has been read; it exists while the unit is in progress.

    Args:
        scratch: the scratch folder of the command.
        unit: number of the unit.
    """

    def __init__(self, scratch: str, unit: int):
        self._path = Path(scratch, RUNNING, str(unit))
        self._written = 0.0

    def __enter__(self) -> "ProgressMark":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("0 0")
        return self

    def update(self, offset: int, bad_rows: int) -> None:
        """Write the number of stored bytes that have been read, and of bad rows."""
        if time.monotonic() > self._written + _PERIOD:
            self._path.write_text(f"{offset} {bad_rows}")
            self._written = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._path.unlink(missing_ok=True)
