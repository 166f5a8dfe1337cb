"""Lengths of the rows of fine-tuning shards, the lengths of micro-batches, and grouping by length.

A fine-tuning row is padded to a multiple of a few tokens. A micro-batch is as long as its longest row, rounded up to
the next of a few lengths, its bucket. So compute follows the content, and the number of tensor shapes stays small.

Shapes: N rows of the shards, E rows of an epoch, G rows of a global batch.
"""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.output import LENGTHS
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage

MAX_BUCKETS = 6
# Global batches in which rows are grouped by length. Few, so that each step still sees a random part of the data.
_WINDOW = 32


def padded_length(tokens: int, multiple: int, seq_len: int) -> int:
    """Return the length of a row of `tokens` tokens, padded to a multiple; at most `seq_len`."""
    return min(-(-tokens // multiple) * multiple, seq_len)


def buckets(seq_len: int, multiple: int) -> tuple[int, ...]:
    """Return the possible lengths of a micro-batch, ascending: seq_len and its halves, at most `MAX_BUCKETS`.

    Args:
        multiple: tokens; every bucket is a multiple, except for seq_len.
    """
    return tuple(sorted({padded_length(-(-seq_len >> k) or 1, multiple, seq_len) for k in range(MAX_BUCKETS)}))


@dataclass(frozen=True)
class TokenShares:
    """Token counts of rows of different lengths."""

    content: int
    padding: int  # end-of-text after the content, up to the row's length; masked and scored
    fill: int  # between the row's length and the micro-batch's; neither attended to nor scored

    def __str__(self) -> str:
        counts = asdict(self)
        total = max(sum(counts.values()), 1)
        return ", ".join(f"{count:,} tokens ({100 * count / total:.1f}%) of {name}" for name, count in counts.items())


@dataclass(frozen=True)
class RowLengths:
    """Lengths of all rows of a data set, by sample id."""

    content_N: NDArray[np.uint32]  # without padding
    padded_N: NDArray[np.uint32]
    buckets: tuple[int, ...]

    def bucket(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bucket of the longest row along the last dimension of `ids`."""
        table = np.asarray(self.buckets, dtype=np.int64)
        return table[np.searchsorted(table, self.padded_N[ids].max(-1))]

    def group(self, ids_E: NDArray[np.int64], global_batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the epoch's rows in an order that brings rows of similar length together.

        In every window of global batches the rows are sorted by length and cut into global batches, whose order is
        random. The order depends only on (seed, epoch) and on the global batch size, not on ranks or micro-batches. In
        a global batch the longest rows come first, so that rows of a micro-batch have similar lengths, too.
        """
        grouped = np.empty_like(ids_E)
        size = _WINDOW * global_batch_size
        for window, start in enumerate(range(0, len(ids_E), size)):
            ids = ids_E[start : start + size]
            ids = ids[np.argsort(-self.padded_N[ids].astype(np.int64), kind="stable")]
            batches = ids.reshape(-1, global_batch_size)
            order = np.random.default_rng([seed, epoch, window]).permutation(len(batches))
            grouped[start : start + size] = batches[order].flatten()
        return grouped

    def shares(self, ids_Tn: NDArray[np.int64]) -> TokenShares:
        """Count the tokens of T micro-batches of n rows each."""
        content, padded = (
            int(self.content_N[ids_Tn].sum(dtype=np.int64)),
            int(self.padded_N[ids_Tn].sum(dtype=np.int64)),
        )
        return TokenShares(content, padded - content, int(self.bucket(ids_Tn).sum()) * ids_Tn.shape[1] - padded)


def write(folder: Path, lengths: Sequence[int] | NDArray[np.uint32]) -> None:
    """Write the content and padded lengths of a folder's rows, alternating, in the order of the rows."""
    np.save(folder / LENGTHS, np.array(lengths, dtype=np.uint32).reshape(-1, 2), allow_pickle=False)


def fetch(location: str, folder: str) -> None:
    """Copy the lengths from a URL to streaming's local folder; do nothing if they are there.

    Raises:
        UserError: if they cannot be copied.
    """
    path = Path(folder, LENGTHS)
    if path.exists():
        return
    try:
        content = Storage(location).read(LENGTHS)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(content)
        partial.replace(path)
    except Exception as error:  # each remote file system has different error classes
        raise UserError(
            f"The row lengths {location}/{LENGTHS} cannot be copied ({one_line(error)}); restore the file, or prepare "
            "the data anew."
        ) from None


def read(folder: str, rows: int, seq_len: int) -> NDArray[np.uint32]:
    """Read the (content, padded) lengths of a folder's rows, `[rows, 2]`.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = Path(folder, LENGTHS)
    try:
        lengths = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"The row lengths {path} cannot be read ({one_line(error)}); restore the file, or prepare the data anew."
        ) from None
    require(
        lengths.dtype == np.uint32
        and lengths.shape == (rows, 2)
        and bool((lengths[:, 0] <= lengths[:, 1]).all() and (lengths[:, 1] <= seq_len).all()),
        f"The row lengths {path} do not fit the {rows} rows of the shards; restore the file, or prepare the data anew.",
    )
    return np.asarray(lengths)
