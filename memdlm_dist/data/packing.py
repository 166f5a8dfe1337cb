"""Packing of documents into rows of a fixed length: concatenated and cut, or whole by best fit."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.sequences import Document, TrainingSequence

# Tokens in rows that are open at the same time; enough to fill nearly every row.
_OPEN_TOKENS = 2**24


class Concatenation:
    """Concatenation of documents, cut into rows of `length` tokens that do not record document boundaries.

    The incomplete last row is dropped; `tail` is its length.
    """

    def __init__(self, length: int):
        self._length = length
        self._pieces: list[NDArray[np.uint32]] = []  # tokens of the incomplete last row
        self._size = 0
        self._all_maskable = np.ones(length, dtype=np.bool_)

    def add(self, tokens: NDArray[np.uint32]) -> Iterator[TrainingSequence]:
        """Add a document and yield the rows that it completes; every token is maskable."""
        self._pieces.append(tokens)
        self._size += len(tokens)
        if self._size < self._length:
            return
        stream = np.concatenate(self._pieces)
        self._size %= self._length
        self._pieces = [stream[len(stream) - self._size :].copy()]
        for start in range(0, len(stream) - self._size, self._length):
            yield TrainingSequence(stream[start : start + self._length].astype(np.int64), self._all_maskable)

    @property
    def tail(self) -> int:
        """Number of tokens in the incomplete last row."""
        return self._size


class BestFit:
    """Best-fit packing of whole documents into rows of `length` tokens that record document boundaries.

    Each document goes into the open row with the least free space that it fits in. A document longer than a row is cut,
    and each piece counts as a document. Padding is end-of-text, belongs to no document and is never masked. The
    number of open rows is bounded: beyond the bound the fullest row is closed.
    """

    def __init__(self, length: int, eos_id: int):
        self._length, self._eos_id = length, eos_id
        self._max_open_rows = max(64, _OPEN_TOKENS // length)
        # Open rows: (free tokens, row number), sorted; and row number -> (tokens, maskable flags) of each document.
        self._free_space: list[tuple[int, int]] = []
        self._open_rows: dict[int, list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]] = {}
        self.rows = self.documents = self.tokens = self.most_documents = 0

    def add(self, document: Document) -> Iterator[TrainingSequence]:
        """Add a document and yield the rows that are closed."""
        for start in range(0, len(document.tokens), self._length):
            yield from self._insert(document[start : start + self._length])

    def _insert(self, piece: Document) -> Iterator[TrainingSequence]:
        size = len(piece.tokens)
        index = bisect_left(self._free_space, (size, -1))
        if index == len(self._free_space):
            if len(self._free_space) == self._max_open_rows:
                yield self._close(0)
            free, number = self._length, self.documents  # the first document's number, which is unique
            self._open_rows[number] = []
        else:
            free, number = self._free_space.pop(index)
        self.documents += 1
        self._open_rows[number].append((piece.tokens, piece.maskable))
        insort(self._free_space, (free - size, number))
        if free == size:
            yield self._close(0)

    def _close(self, index: int) -> TrainingSequence:
        free, number = self._free_space.pop(index)
        documents = self._open_rows.pop(number)
        self.rows += 1
        self.tokens += self._length - free
        self.most_documents = max(self.most_documents, len(documents))
        tokens, maskable = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
        return TrainingSequence(
            np.pad(tokens.astype(np.int64), (0, free), constant_values=self._eos_id),
            np.pad(maskable, (0, free)),
            tuple(len(ids) for ids, _ in documents),
        )

    def finish(self) -> Iterator[TrainingSequence]:
        """Close the remaining rows and yield them."""
        while self._free_space:
            yield self._close(0)
