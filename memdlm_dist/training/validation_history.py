"""History of a run's validations: validation.jsonl in its output folder, one JSON object per line."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from memdlm_dist.checkpoint.manager import MEMORY_OFF, MEMORY_ON
from memdlm_dist.errors import UserError

logger = logging.getLogger()

# TensorBoard tags of the losses, which are also their keys in the file.
LOSSES = (MEMORY_OFF, MEMORY_ON)
HISTORY_FILE = "validation.jsonl"


def path_in(dump_folder: str) -> Path:
    """Return the path of the history in a run's output folder."""
    return Path(dump_folder) / HISTORY_FILE


def append(path: Path, step: int, losses: Mapping[str, float]) -> None:
    """Append one validation; losses in nats per token."""
    row = json.dumps({"step": step, **losses}) + "\n"
    with open(path, "a+b") as file:
        # A killed run may have left an incomplete last line.
        file.seek(max(file.tell() - 1, 0))
        incomplete = file.read(1) not in (b"", b"\n")
        file.write(("\n" * incomplete + row).encode())


def history(path: Path) -> list[dict[str, float]]:
    """Return the validations of the last run in an output folder; damaged lines are skipped with a warning.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"The validations in {path} cannot be read ({error}); restore the file or remove it.") from None
    rows = [row for line in lines if (row := _parse(line)) is not None]
    if len(rows) < len(lines):
        logger.warning(f"Skipping {len(lines) - len(rows)} damaged lines of {path}.")
    # A new run in the same folder appends to the file. The last run begins at the last validation of step 0.
    begin = max((i for i, row in enumerate(rows) if row["step"] == 0), default=0)
    return rows[begin:]


def _parse(line: bytes) -> dict[str, float] | None:
    """Return a line's step and losses; None if the line is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    valid = isinstance(row, dict) and "step" in row and all(isinstance(x, int | float) for x in row.values())
    return row if valid else None
