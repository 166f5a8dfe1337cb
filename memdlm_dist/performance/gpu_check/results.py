"""Results of sections, as files that several calls share.

Each machine (kind and number of devices) has a folder of its own, so that measurements of different devices never
replace each other. Of one machine the newest good result of a section stays: a later failure is noted in it, and a
later skip leaves no trace, nor does a quick result with the same torch. Without a good one the newest failure stays.
Sections that look up instead of measuring keep their newest result.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
_NEWEST = ("environment", "tests")  # sections whose newest result stays, good or not


@dataclass
class Result:
    """What one run of a section found."""

    section: str
    machine: str  # number and kind of devices, such as "8 x NVIDIA H100 80GB HBM3"
    torch: str
    date: str
    seconds: float
    status: str  # one of those above
    reason: str = ""  # of a status that is not ok
    quick: bool = False
    commands: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    # The failure of a later run, if this is an earlier good result: date, status and reason.
    later: dict[str, str] | None = None


def keep(folder: Path, new: Result) -> None:
    """Write a result, unless what is there is worth more."""
    path = _folder(folder, new.machine) / f"{new.section}.json"
    old = _read(path)
    if old is not None and new.status == SKIPPED and old.status != SKIPPED:
        return
    if old is not None and old.status == OK and new.section not in _NEWEST:
        if new.status != OK:
            new = replace(old, later={"date": new.date, "status": new.status, "reason": new.reason})
        elif new.quick and not old.quick and new.torch == old.torch:
            new = replace(old, later=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(asdict(new), indent=1) + "\n")
    unfinished.replace(path)


def load(folder: Path, machine: str, sections: Sequence[str]) -> dict[str, Result]:
    """Return the kept results of a machine, by section."""
    found = {name: _read(_folder(folder, machine) / f"{name}.json") for name in sections}
    return {name: result for name, result in found.items() if result is not None}


def machines(folder: Path) -> list[str]:
    """Return the machines that have results."""
    found = {path.parent: _read(path) for path in sorted((folder / "results").glob("*/*.json"))}
    return [result.machine for result in found.values() if result is not None]


def _folder(folder: Path, machine: str) -> Path:
    return folder / "results" / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def _read(path: Path) -> Result | None:
    """Return the result in a file; None if there is none that can be read."""
    try:
        found = Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.machine, str) else None
