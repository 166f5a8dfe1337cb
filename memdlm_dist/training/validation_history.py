"""The validations of a run, one JSON object a line in its output folder."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from memdlm_dist.checkpoint.manager import MEMORY_OFF, MEMORY_ON
from memdlm_dist.errors import UserError

logger = logging.getLogger()

# TensorBoard's names of the losses, which are the file's too.
LOSSES = (MEMORY_OFF, MEMORY_ON)
HISTORY_FILE = "validation.jsonl"


def path_in(dump_folder: str) -> Path:
    """Return the history's path in a run's output folder."""
    return Path(dump_folder) / HISTORY_FILE


def append(path: Path, step: int, losses: Mapping[str, float]) -> None:
    """Add one validation."""
    row = json.dumps({"step": step, **losses}) + "\n"
    with open(path, "a+b") as file:
        # A run that was killed may have left half a line.
        file.seek(max(file.tell() - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * torn + row).encode())


def history(path: Path) -> list[dict[str, float]]:
    """Read the validations of a folder's last run, without lines that are damaged.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"The validations in {path} cannot be read ({error}); restore the file or remove it.") from None
    rows = [row for line in lines if (row := _parse(line)) is not None]
    if len(rows) < len(lines):
        logger.warning(f"{len(lines) - len(rows)} damaged lines of {path} are left out.")
    # The file outlives a run that was started anew in the same folder: the last one began at its last step 0.
    begin = max((i for i, row in enumerate(rows) if row["step"] == 0), default=0)
    return rows[begin:]


def _parse(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    numbers = isinstance(row, dict) and "step" in row and all(isinstance(x, int | float) for x in row.values())
    return row if numbers else None
