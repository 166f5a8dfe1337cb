"""The validations of a run, one JSON object a line in its output folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from memdlm_dist.checkpoint.manager import MEMORY_OFF, MEMORY_ON
from memdlm_dist.errors import UserError

# TensorBoard's names of the losses, which are the file's too.
LOSSES = (MEMORY_OFF, MEMORY_ON)
HISTORY_FILE = "validation.jsonl"


def path_in(dump_folder: str) -> Path:
    """Return the history's path in a run's output folder."""
    return Path(dump_folder) / HISTORY_FILE


def append(path: Path, step: int, losses: Mapping[str, float]) -> None:
    """Add one validation."""
    with open(path, "a") as file:
        file.write(json.dumps({"step": step, **losses}) + "\n")


def history(path: Path) -> list[dict[str, float]]:
    """Read the validations of a folder's last run.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # The file outlives a run that was started anew in the same folder: the last one began at its last step 0.
        begin = max((i for i, row in enumerate(rows) if row["step"] == 0), default=0)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"The validations in {path} cannot be read ({error}); restore the file or remove it.") from None
    return rows[begin:]


def by_step(path: Path, name: str) -> dict[int, float]:
    """Return step -> one of `LOSSES` where it is finite, of the folder's last run; empty if there was no validation."""
    rows = history(path) if path.is_file() else []
    return {int(row["step"]): row[name] for row in rows if math.isfinite(row.get(name, math.nan))}
