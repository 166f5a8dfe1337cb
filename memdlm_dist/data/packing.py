"""Documents to rows of one fixed length: end to end and cut, or whole and apart, as they fit best."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.sequences import Document, TrainingSequence

# Tokens in rows that wait for what fits in: enough that nearly every row gets filled.
_WAITING = 2**24


class Concatenation:
    """Documents end to end, cut into rows of `length` tokens; a row does not know where its documents end.

    The incomplete last row is left out; `tail` is its length.
    """

    def __init__(self, length: int):
        self._length = length
        self._buffer: list[int] = []
        self._everything = np.ones(length, dtype=np.bool_)

    def add(self, tokens: list[int]) -> Iterator[TrainingSequence]:
        """The rows that one more document completes. Every token is maskable."""
        self._buffer += tokens
        start = 0
        while len(self._buffer) - start >= self._length:
            yield TrainingSequence(
                np.array(self._buffer[start : start + self._length], dtype=np.int64), self._everything
            )
            start += self._length
        del self._buffer[:start]

    @property
    def tail(self) -> int:
        return len(self._buffer)


class BestFit:
    """Whole documents, each in the row that it leaves the least room in; the rows know their documents.

    A document longer than a row is cut, and each piece is a document. What stays free is filled with end-of-text,
    which is no document and never masked. A bounded number of rows wait to be filled: the fullest leaves first.
    """

    def __init__(self, length: int, eos_id: int):
        self._length, self._eos_id = length, eos_id
        self._limit = max(64, _WAITING // length)
        # Of the rows that wait: room left and number, in this order; and by number tokens and flags of their documents.
        self._rooms: list[tuple[int, int]] = []
        self._waiting: dict[int, list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]] = {}
        self.rows = self.documents = self.tokens = self.most_documents = 0

    def add(self, document: Document) -> Iterator[TrainingSequence]:
        """The rows that leave because of one more document."""
        for start in range(0, len(document.tokens), self._length):
            yield from self._place(document[start : start + self._length])

    def _place(self, piece: Document) -> Iterator[TrainingSequence]:
        size = len(piece.tokens)
        place = bisect_left(self._rooms, (size, -1))
        if place == len(self._rooms):
            if len(self._rooms) == self._limit:
                yield self._leave(0)
            room, number = self._length, self.documents  # of the first document, so that no two rows share it
            self._waiting[number] = []
        else:
            room, number = self._rooms.pop(place)
        self.documents += 1
        self._waiting[number].append((np.array(piece.tokens, np.uint32), np.array(piece.maskable, np.bool_)))
        insort(self._rooms, (room - size, number))
        if room == size:
            yield self._leave(0)

    def _leave(self, place: int) -> TrainingSequence:
        room, number = self._rooms.pop(place)
        documents = self._waiting.pop(number)
        self.rows += 1
        self.tokens += self._length - room
        self.most_documents = max(self.most_documents, len(documents))
        tokens, maskable = (np.concatenate(parts) for parts in zip(*documents, strict=True))
        return TrainingSequence(
            np.pad(tokens.astype(np.int64), (0, room), constant_values=self._eos_id),
            np.pad(maskable, (0, room)),
            tuple(len(of_document) for of_document, _ in documents),
        )

    def finish(self) -> Iterator[TrainingSequence]:
        """The rows that still wait."""
        while self._rooms:
            yield self._leave(0)
