"""Terminal view of one prompt's canvas, redrawn in place while it is decoded."""

import shutil
from itertools import groupby

from memdlm_dist.inference.sampler import Step
from memdlm_dist.inference.trained_model import TrainedModel

_BLANK, _DIM, _BOLD, _PLAIN = "░", "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Screen:
    """Terminal view of one prompt's canvas, redrawn in place."""

    def __init__(self, model: TrainedModel):
        self._model, self._lines = model, 0

    def draw(self, step: Step, length: int) -> None:
        """Draw the first `length` tokens after a step: the step's new tokens in bold, [MASK]s as blocks."""
        tokens, still_open, kept = (x[0, :length].tolist() for x in step)
        cells: list[tuple[str, str]] = []  # (style, character)
        positions = range(length)
        # Decode neighbours of the same kind together, because a character can consist of several tokens.
        for (masked, new), group in groupby(positions, key=lambda i: (still_open[i], kept[i])):
            members = list(group)
            text = _BLANK * len(members) if masked else self._model.tokenizer.decode([tokens[i] for i in members])
            style = _DIM if masked else _BOLD if new else ""
            cells += [(style, c if c.isprintable() or c == "\n" else " ") for c in text.expandtabs()]
        columns, rows = shutil.get_terminal_size()
        lines: list[list[tuple[str, str]]] = [[]]
        for style, c in cells:
            if c == "\n" or len(lines[-1]) == columns:
                lines.append([])
            if c != "\n":
                lines[-1].append((style, c))
        lines = lines[-(rows - 1) :]
        # Overwrite the previous drawing: move up by its number of lines and clear to the end of the screen.
        print(f"\x1b[{self._lines}F\x1b[J" if self._lines else "", end="")
        print("\n".join(map(_coloured, lines)), flush=True)
        self._lines = len(lines)

    def clear(self) -> None:
        """Erase the drawing."""
        print(f"\x1b[{self._lines}F\x1b[J" if self._lines else "", end="", flush=True)


def _coloured(line: list[tuple[str, str]]) -> str:
    """Return a line of (style, character) cells as text with escape sequences."""
    groups = groupby(line, key=lambda cell: cell[0])
    return "".join(f"{style}{''.join(c for _, c in group)}{_PLAIN if style else ''}" for style, group in groups)
