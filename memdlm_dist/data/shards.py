"""Tokenised shards on disk: MDS files, and a card that describes them."""

import json
from array import array
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from memdlm_dist.data import row_lengths
from memdlm_dist.data.output import CARD
from memdlm_dist.data.row_lengths import TokenShares
from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage

HASH = "xxh64"
SHARD_SIZE = 1 << 26  # bytes
# Format of the card and of the MDS columns. A card of memdlm_dist 0.1 has no format number, which means format 1.
# Format 2 adds `most_documents`. Format 3 adds `pad_multiple` and rows of different lengths.
FORMAT = 3


@dataclass(frozen=True)
class Card:
    """Description of a folder of shards; the file memdlm.json next to index.json."""

    seq_len: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    sequences: int = 0
    documents: bool = False  # the rows record document boundaries
    most_documents: int = 0  # largest number of documents in a row; 0 without document boundaries and in format 1
    # Rows are padded to multiples of this number of tokens, and lengths.npy has their lengths; 0: all rows are equal.
    pad_multiple: int = 0
    format: int = FORMAT


class _PublishingWriter(MDSWriter):
    """MDSWriter that tells when a shard is on disk."""

    publish: Callable[[str], None]

    def flush_shard(self) -> None:
        super().flush_shard()
        self.publish(self.shards[-1]["raw_data"]["basename"])


class ShardWriter:
    """Writer of rows to MDS shards; the folder is complete when the context exits without an error.

    A token takes 2 bytes if the vocabulary has at most 65,536 tokens, else 4. A maskable flag takes 1 bit. With
    `card.documents`, the length of each document takes 4 bytes. With `card.pad_multiple`, rows may have any length up
    to `card.seq_len`, and their lengths are written next to the shards.

    Args:
        folder: new or empty folder.
        card: description of the shards; the writer counts `sequences` and `most_documents`, and clears `pad_multiple`
            if all rows turn out to have one length.
        size_limit: maximum number of bytes of one shard.
        publish: called with the path of each shard as soon as it is written; it may move the file.
    """

    def __init__(
        self,
        folder: Path,
        card: Card,
        size_limit: int = SHARD_SIZE,
        publish: Callable[[Path], None] = lambda path: None,
    ):
        self._folder, self._card = folder, card
        self._sequences = self._most_documents = 0
        self._dtype = np.uint16 if card.vocab_size <= 1 << 16 else np.uint32
        shape = "" if card.pad_multiple else f":{card.seq_len}"
        columns = {"tokens": f"ndarray:{self._dtype.__name__}{shape}", "maskable": "bytes"}
        self.lengths = array("I")  # content and length of every row
        if card.documents:
            columns["documents"] = "bytes"
        self._writer = _PublishingWriter(
            out=str(folder), columns=columns, hashes=[HASH], size_limit=size_limit, progress_bar=False
        )
        self._writer.publish = lambda name: publish(folder / name)

    def write(self, row: TrainingSequence) -> None:
        """Append one row and count it in the card."""
        sample = {"tokens": row.tokens_L.astype(self._dtype), "maskable": np.packbits(row.maskable_L).tobytes()}
        if self._card.documents:
            documents = row.documents or (self._card.seq_len,)  # without boundaries a row is one document
            sample["documents"] = np.array(documents, dtype=np.uint32).tobytes()
            self._most_documents = max(self._most_documents, len(documents))
        self._writer.write(sample)
        if self._card.pad_multiple or row.content is not None:
            length = len(row.tokens_L)
            self.lengths.extend((length if row.content is None else row.content, length))
        self._sequences += 1

    @property
    def card(self) -> Card:
        """Description of the rows so far."""
        return replace(self._card, sequences=self._sequences, most_documents=self._most_documents)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Entries of index.json for the shards that are written."""
        return self._writer.shards

    @property
    def varies(self) -> bool:
        """True if rows of different lengths were written."""
        return any(length != self._card.seq_len for length in self.lengths[1::2])

    def shares(self) -> TokenShares:
        """Return the counts of content and padding so far; fill depends on the batches of a run and is 0 here."""
        content, length = sum(self.lengths[::2]), sum(self.lengths[1::2])
        return TokenShares(content, length - content, 0)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        self._writer.__exit__(error_type, error, traceback)
        if error_type is None:
            if self.varies:
                row_lengths.write(self._folder, self.lengths)
            else:
                self._card = replace(self._card, pad_multiple=0)
            (self._folder / CARD).write_text(json.dumps(asdict(self.card), indent=2) + "\n")


def read_card(location: str) -> Card:
    """Read the card of a folder or URL of shards.

    Raises:
        UserError: if the card is missing, damaged, or of a format that this version cannot read.
    """
    storage = Storage(location)
    try:
        values = storage.read_json(CARD)
    except FileNotFoundError:
        raise UserError(
            f"There are no shards in {location} ({CARD} is missing); prepare them with tools/prepare_data.py "
            "or correct data.train and data.validation."
        ) from None
    except Exception as error:  # each remote file system has different error classes
        raise UserError(
            f"The shards' card {storage.url(CARD)} cannot be read ({one_line(error)}); restore it, or prepare the data "
            "anew."
        ) from None
    if problem := _problem(values):
        raise UserError(f"The shards' card {storage.url(CARD)} {problem}.")
    return Card(**{"format": 1, **values})


def _problem(values: Any) -> str:
    """Return the problem of a card and its remedy, as a predicate; an empty string if the card is valid."""
    if not isinstance(values, dict):
        return "is not a JSON object; prepare the data anew"
    format_number = values.get("format", 1)
    if type(format_number) is not int or format_number < 1:
        return "has no valid format; prepare the data anew"
    if format_number > FORMAT:
        return (
            f"has format {format_number}, but this version of memdlm_dist reads format {FORMAT} at most; use a version "
            f"that reads format {format_number}, or prepare the data anew"
        )
    types = {field.name: field.type for field in fields(Card)}
    if unknown := sorted(values.keys() - types.keys()):
        return (
            f"has the key {unknown[0]!r}, which format {format_number} does not have; use the version of memdlm_dist "
            "that wrote it, or prepare the data anew"
        )
    wrong = [name for name, value in values.items() if type(value) is not types[name] or value < 0]
    missing = [field.name for field in fields(Card) if field.default is MISSING and field.name not in values]
    if wrong or missing:
        return f"has no valid {(wrong + missing)[0]}; prepare the data anew"
    return ""
