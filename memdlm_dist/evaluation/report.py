"""What evaluations leave behind: tables on the console, JSON, and plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def laid_out(line: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(laid_out, lines))


def check_output(folder: Path, *names: str, overwrite: bool) -> None:
    """The results can be written, and nothing is there that would be lost.

    Raises:
        UserError: naming the folder or the file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be made: {error}.") from None
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise UserError(f"{folder / name} exists; choose another --output, or pass --overwrite to replace it.")


def write_json(path: Path, value: Any) -> None:
    """Readable JSON, which takes its place when it is whole."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


def read_json(path: Path) -> Any:
    """What an evaluation wrote.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no {path}; run that evaluation first.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def pyplot() -> Any:
    """matplotlib, drawing into files.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "Plots need matplotlib; install the package's [eval] extra (pip install -e '.[eval]')."
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """As PNG; free it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
