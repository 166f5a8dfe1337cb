"""Results of sections, as files that several calls share.

Each machine (kind and number of devices) has a separate folder, so that measurements of different devices never replace
each other. For each section of a machine the newest successful result is kept:

- A later failure is noted in the kept result.
- A later skip is dropped, and so is a later quick result with the same torch version.
- If no result is successful, the newest failure is kept.
- The sections `environment` and `tests` always keep their newest result.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

OK, FAILED, TIMED_OUT, SKIPPED = "ok", "failed", "timed out", "skipped"
_NEWEST = ("environment", "tests")  # sections that keep their newest result, successful or not


@dataclass
class Result:
    """Result of one run of a section; its fields are the keys of the JSON file."""

    section: str
    machine: str  # number and kind of devices, such as "8 x NVIDIA H100 80GB HBM3"
    torch: str
    date: str
    seconds: float
    status: str  # OK, FAILED, TIMED_OUT or SKIPPED
    reason: str = ""  # why the status is not OK
    quick: bool = False
    commands: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    # Failure of a later run, noted in a successful result: date, status and reason.
    later: dict[str, str] | None = None


def keep(folder: Path, new: Result) -> None:
    """Write a result, unless the rules above keep the existing one."""
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
    """Return the kept results of a machine, by section name."""
    kept = {name: _read(_folder(folder, machine) / f"{name}.json") for name in sections}
    return {name: result for name, result in kept.items() if result is not None}


def machines(folder: Path) -> list[str]:
    """Return the names of the machines that have results."""
    by_folder = {path.parent: _read(path) for path in sorted((folder / "results").glob("*/*.json"))}
    return [result.machine for result in by_folder.values() if result is not None]


def _folder(folder: Path, machine: str) -> Path:
    """Return the folder of a machine's results."""
    return folder / "results" / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def _read(path: Path) -> Result | None:
    """Return the result in a file; None if the file is missing or damaged."""
    try:
        result = Result(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return result if isinstance(result.machine, str) else None
