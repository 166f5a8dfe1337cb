"""Output of evaluations: console tables, JSON files and plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with aligned columns: the first column left-aligned, the others right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def format_line(line: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(format_line, lines))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with padded cells."""
    lines = [header, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    texts = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    texts.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(text)} |" for text in texts)


def check_output(folder: Path, *names: str, overwrite: bool) -> None:
    """Create the output folder and check that no result in it would be overwritten.

    Args:
        folder: the output folder.
        names: file names of the results.
        overwrite: allow existing results.

    Raises:
        UserError: if the folder cannot be created, or a result exists and `overwrite` is False.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be created ({error}); choose another --output.") from None
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise UserError(f"{folder / name} exists; choose another --output, or pass --overwrite to replace it.")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a result file.

    Raises:
        UserError: if the file is missing or unreadable.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no {path}; run that evaluation first.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run that evaluation again.") from None


def pyplot() -> Any:
    """Import `matplotlib.pyplot` with a backend that needs no display.

    Raises:
        UserError: if matplotlib is not installed.
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
    """Save a figure in a file and close the figure; the suffix of `path` determines the format."""
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")  # with legends outside of the panels
    pyplot().close(figure)
