"""Shares of several streams in an epoch, and the number of times that a run reads each stream."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

logger = logging.getLogger()

# Epochs up to which repeated text trains nearly as well as new text: Muennighoff et al. (2023), Scaling
# Data-Constrained Language Models.
MAX_EPOCHS = 4
_WIDTH = 60  # characters of a location
_NAMED = 3  # streams in a warning


@dataclass(frozen=True)
class StreamShare:
    """Share of a stream in an epoch.

    Attributes:
        rows: number of rows of the stream.
        samples: number of rows that streaming draws from it in an epoch.
    """

    location: str
    rows: int
    samples: int


def log(shares: Sequence[StreamShare], steps: int, global_batch_size: int) -> None:
    """Log the table of several streams, and warn of those that are repeated often or never read."""
    if len(shares) < 2:
        return
    epochs = run_epochs(shares, steps * global_batch_size)
    logger.info(f"Streams of data.train, in an epoch and in the run's {steps:,} steps:\n{table(shares, epochs)}")
    repeated = [f"{share.location} ({n:.1f})" for share, n in zip(shares, epochs, strict=True) if n > MAX_EPOCHS]
    if repeated:
        logger.warning(
            f"This run reads {len(repeated)} of {len(shares)} streams more than {MAX_EPOCHS} times: {_some(repeated)}. "
            "Text that is repeated so often trains worse than new text; lower its share in data.proportions, shorten "
            "the run, or add data."
        )
    if unread := [share.location for share in shares if not share.samples]:
        logger.warning(
            f"This run never reads {len(unread)} of {len(shares)} streams: {_some(unread)}. Their shares are less than "
            "one row of an epoch; raise them in data.proportions."
        )


def run_epochs(shares: Sequence[StreamShare], samples: int) -> list[float]:
    """Return the number of epochs of each stream in a run of `samples` samples over all streams.

    The numbers are means: which samples of an incomplete epoch belong to a stream is random.
    """
    epoch = sum(share.samples for share in shares)
    return [samples / epoch * share.samples / share.rows for share in shares]


def table(shares: Sequence[StreamShare], epochs: Sequence[float]) -> str:
    """Format the streams as a table with a line for each.

    Args:
        epochs: of each stream in the run.
    """
    total = sum(share.samples for share in shares)
    lines = [("stream", "rows", "share (%)", "samples/epoch", "stream epochs/epoch", "stream epochs/run")]
    for share, n in zip(shares, epochs, strict=True):
        name = share.location if len(share.location) <= _WIDTH else "..." + share.location[3 - _WIDTH :]
        numbers = (f"{100 * share.samples / total:.2f}", f"{share.samples:,}")
        lines.append((name, f"{share.rows:,}", *numbers, _number(share.samples / share.rows), _number(n)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for name, *cells in lines
    )


def _number(value: float) -> str:
    return f"{value:,.2f}" if value == 0 or value >= 0.01 else f"{value:.1e}"


def _some(names: Sequence[str]) -> str:
    others = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {others} others" if others > 0 else "")
