"""Report of `prepare_data.py inspect`: card, counts, histogram of lengths, and a sequence as text."""

import os
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.output import SUMMARY
from memdlm_dist.data.preparation.contents import Contents, Lengths, Part, Sequence
from memdlm_dist.data.tokenizer import DiffusionTokenizer

Colour = Literal["auto", "always", "never"]
# Parameters of the escape sequence that selects a colour: cyan, green, magenta, dim.
_STYLES = {Part.TEXT: "", Part.PROMPT: "36", Part.RESPONSE: "32", Part.END_OF_TEXT: "35", Part.PADDING: "2"}
_BOUNDARY = "35"
_PLAIN = "\x1b[0m"
_COLUMNS = 80
_BINS = 16
_BAR = 36  # columns of the longest bar
_ENDS = 400  # tokens that are shown of each end of a long sequence


def report(
    location: str, split: str, tokenizer: str | None, rows: int, sequence: int, colour: Colour, full: bool
) -> str:
    """Return a report about prepared data.

    Args:
        location, split, tokenizer: see `Contents`.
        rows: maximum number of rows to count lengths in.
        sequence: number of the sequence to show; a negative number counts from the end.
        full: show all tokens of the sequence.

    Raises:
        UserError: if the data are missing or damaged, or have no such sequence.
    """
    with tempfile.TemporaryDirectory(prefix="memdlm_inspect_") as scratch:
        contents = Contents(location, split, tokenizer, scratch)
        size = contents.card.sequences
        if not size:
            return heading(contents)
        chosen, lengths = contents.sequence(sequence), contents.lengths(rows)
    tokens = len(chosen.tokens_L)
    text = render(chosen, contents.tokenizer, in_colour(colour), tokens if full else _ENDS)
    title = f"Sequence {sequence % size:,} (of {size:,}), {tokens:,} tokens"
    return "\n\n".join((heading(contents), lengths_report(lengths, size), f"{title}\n{text}"))


def show(text: str) -> None:
    """Print a text; a reader that leaves early, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_colour(colour: Colour) -> bool:
    """Return whether to print colours; "auto" does for a terminal, unless NO_COLOR is set."""
    return colour == "always" or (colour == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR"))


def heading(contents: Contents) -> str:
    """Return location, card and counts."""
    card = {name.replace("_", " "): value for name, value in asdict(contents.card).items()}
    lines = ["card: " + ", ".join(f"{name} {value}" for name, value in card.items())]
    numbers = {name: value for name, value in contents.counts.items() if isinstance(value, int)}
    sequences = contents.counts.get("sequences")
    if isinstance(sequences, dict):
        numbers |= {f"{split} sequences": n for split, n in sequences.items() if isinstance(n, int)}
    if numbers:
        counts = ", ".join(f"{escaped(name.replace('_', ' '))} {value:,}" for name, value in numbers.items())
        lines.append(f"{SUMMARY}: {counts}")
    wrapped = [textwrap.fill(line, _COLUMNS, subsequent_indent="  ") for line in lines]
    return "\n".join([escaped(contents.folder), *wrapped])


def lengths_report(lengths: Lengths, sequences: int) -> str:
    """Return the counts of tokens and the histogram of lengths, each line at most 80 columns wide."""
    share = 100 * lengths.padding / max(lengths.content + lengths.padding, 1)
    where = f"all {lengths.rows:,} rows" if lengths.rows == sequences else f"{lengths.rows:,} of {sequences:,} rows"
    lines = [
        f"Read {where}: {lengths.content:,} tokens of content, {lengths.padding:,} of padding ({share:.1f}%)",
        f"Lengths of {lengths.of} in tokens: " + _statistics(lengths.values),
    ]
    return "\n".join(lines + histogram(lengths.values))


def _statistics(values: NDArray[np.int64]) -> str:
    if not len(values):
        return "none is complete in these rows"
    return f"{len(values):,}, median {np.median(values):,.0f}, mean {values.mean():,.0f}, longest {values.max():,}"


def histogram(values: NDArray[np.int64]) -> list[str]:
    """Return the lines of a histogram of positive integers with log-spaced bins."""
    values = values[values > 0]
    if not len(values):
        return []
    edges = np.unique(np.geomspace(values.min(), values.max() + 1, _BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(values, edges)
    return [
        f"{first:>10,} -{following - 1:>10,} {'█' * -(-_BAR * int(count) // int(counts.max())):<{_BAR}} "
        f"{count:>11,} {100 * count / len(values):>5.1f}%"
        for (first, following), count in zip(pairwise(edges.tolist()), counts.tolist(), strict=True)
    ]


def escaped(text: str) -> str:
    """Replace the characters that control a terminal or reorder its text by escapes; keep tabs and line feeds."""
    return "".join(
        c if c.isprintable() or c in "\t\n" or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


def render(sequence: Sequence, tokenizer: DiffusionTokenizer, colours: bool, ends: int) -> str:
    """Return a sequence as text: with a legend of colours, or with a line before each part that names it.

    The tokens of a part are decoded together, because a character can consist of several tokens.

    Args:
        ends: number of tokens to show of each end of the content.
    """

    def mark(text: str, style: str) -> str:
        return _painted(f"[{text}]", style) if colours else f"[{text}]"

    blocks = []
    if colours:
        parts = [Part(number) for number in np.unique(sequence.parts_L)]
        blocks.append("colours: " + ", ".join(_painted(str(part), _STYLES[part]) for part in parts))
    sizes = np.bincount(sequence.document_L[: sequence.content])
    document, inline = 0 if len(sizes) < 2 else -1, False
    for start, end, skipped in _runs(sequence, ends):
        part, number = Part(sequence.parts_L[start]), int(sequence.document_L[start])
        if not skipped and part is not Part.PADDING and number != document:
            document, inline = number, False
            blocks.append(mark(f"document {number + 1:,} of {len(sizes):,}, {sizes[number]:,} tokens", _BOUNDARY))
        if skipped or part in (Part.PADDING, Part.END_OF_TEXT):
            times = f" x {end - start:,}" if end - start > 1 else ""
            label = f"{end - start:,} more tokens" if skipped else f"{part}{times}"
            blocks.append(mark(label, "" if skipped else _STYLES[part]))
            inline = False
            continue
        ids = sequence.tokens_L[start:end].tolist()
        text = escaped(tokenizer.tokenizer.decode(ids, skip_special_tokens=False))
        if not colours:
            blocks += [mark(str(part), ""), text]
        elif inline:  # a response follows its prompt on the same line
            blocks[-1] += _painted(text, _STYLES[part])
        else:
            blocks.append(_painted(text, _STYLES[part]))
        inline = True
    return "\n".join(blocks)


def _runs(sequence: Sequence, ends: int) -> Iterator[tuple[int, int, bool]]:
    """Yield start and end of runs of tokens of one part and one document, and whether the run is left out.

    The content between its first and its last `ends` tokens is one run, which is left out.
    """
    first, last = ends, sequence.content - ends
    changes = (np.diff(sequence.parts_L) != 0) | (np.diff(sequence.document_L) != 0)
    if first < last:
        changes[first - 1 : last] = False
        changes[[first - 1, last - 1]] = True
    for start, end in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(sequence.tokens_L)]):
        yield start, end, first < last and start == first


def _painted(text: str, style: str) -> str:
    """Colour a text line by line, since pagers forget a colour at the end of a line."""
    return "\n".join(f"\x1b[{style}m{line}{_PLAIN}" if style and line else line for line in text.split("\n"))
