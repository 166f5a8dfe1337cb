"""Reading of prepared shards for `prepare_data.py inspect`: card, counts, lengths, single sequences."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.dataset import open_dataset
from memdlm_dist.data.output import CARD, SUMMARY, TOKENIZER
from memdlm_dist.data.row_shape import RowShape
from memdlm_dist.data.settings import Data
from memdlm_dist.data.shards import Card, read_card
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError, require
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage, is_remote

# Shards that lengths are counted in. Few, because each is copied from a URL and its checksum is computed.
_SHARDS = 4


class Part(IntEnum):
    """Part of a sequence."""

    TEXT = 0
    END_OF_TEXT = 1  # token after a document
    PROMPT = 2
    RESPONSE = 3
    PADDING = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class Sequence:
    """One stored sequence of L tokens; padding is at its end.

    Attributes:
        parts_L: the `Part` of each token.
        document_L: number of each token's document in a packed row, and `PADDING` at padding; zeros and `PADDING` in
            other rows.
    """

    tokens_L: NDArray[np.int64]
    parts_L: NDArray[np.uint8]
    document_L: NDArray[np.int64]

    @property
    def content(self) -> int:
        """Number of tokens before the padding."""
        return int((self.document_L != PADDING).sum())


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, and the rows in which they were counted.

    Attributes:
        of: what has these lengths.
        content, padding: number of tokens in these rows.
    """

    of: str
    values: NDArray[np.int64]
    rows: int
    content: int
    padding: int


class Contents:
    """Shards of one split, and the tokenizer that they were prepared with.

    Args:
        location: folder or URL of an output of prepare_data.py, or of shards.
        split: folder to read in an output of prepare_data.py.
        tokenizer: folder, URL or name of the hub; None for the one in the output.
        scratch: empty folder for copies of what is read from a URL.

    Attributes:
        folder: path or URL of the shards.
        counts: content of summary.json; empty without the file.

    Raises:
        UserError: if card, counts, tokenizer, index or a local shard are missing or damaged, or do not fit together.
    """

    def __init__(self, location: str, split: str, tokenizer: str | None, scratch: str):
        self.folder, output = _find(location, split)
        self.card = read_card(self.folder)
        self.counts = _read_counts(output)
        self.tokenizer = _read_tokenizer(hub.tokenizer(tokenizer) if tokenizer else f"{output}/{TOKENIZER}", scratch)
        _check_tokenizer(self.folder, self.card, self.tokenizer)
        if not self.card.sequences:
            return
        rows = RowShape(int(self.card.documents))
        if self.card.pad_multiple:
            rows = RowShape(buckets=(self.card.seq_len,), varying=(self.folder,))
        self._dataset = open_dataset(Data(cache_folder=scratch), [self.folder], [], rows, batch_size=1, shuffle=False)
        require(
            self._dataset.size == self.card.sequences,
            f"The card of the shards in {self.folder} states {self.card.sequences} sequences, but their index "
            f"{self._dataset.size}; restore the files, or prepare the data anew.",
        )

    def sequence(self, number: int) -> Sequence:
        """Return a sequence; a negative number counts from the end.

        Raises:
            UserError: if there is no such sequence, or its shard is missing or damaged.
        """
        size = self.card.sequences
        require(
            -size <= number < size,
            f"There is no sequence {number} in {self.folder} (it holds {size}); choose one from {-size} to {size - 1}.",
        )
        number %= size
        sample = self._dataset[number]
        tokens_L, maskable_L = sample["tokens"].numpy(), (sample["labels"] != IGNORE_INDEX).numpy()
        require(
            len(tokens_L) == self.card.seq_len or self.card.pad_multiple > 0,
            f"The card of the shards in {self.folder} states {self.card.seq_len} tokens a sequence, but sequence "
            f"{number} has {len(tokens_L)}; restore the files, or prepare the data anew.",
        )
        document_L = sample["documents"].numpy() if self.card.documents else np.zeros(len(tokens_L), np.int64)
        if self.card.pad_multiple:
            document_L[self._dataset.row_lengths.content_N[number] :] = PADDING
        elif not self.card.documents and not maskable_L.all():
            document_L[_content(tokens_L, self.card.eos_token_id) :] = PADDING
        padding_L = document_L == PADDING
        parts_L = np.full(len(tokens_L), Part.TEXT, np.uint8)
        if maskable_L[~padding_L].all():
            parts_L[tokens_L == self.card.eos_token_id] = Part.END_OF_TEXT
        else:
            parts_L[maskable_L] = Part.RESPONSE
            parts_L[~maskable_L] = Part.PROMPT
        parts_L[padding_L] = Part.PADDING
        return Sequence(tokens_L, parts_L, document_L)

    def lengths(self, rows: int) -> Lengths:
        """Return the lengths of documents, or of the content of fine-tuning rows.

        Rows of different lengths have a file of their lengths, and all of them are counted. Otherwise lengths are
        counted in at most `rows` rows of a few shards. Documents that rows cut are then left out.

        Raises:
            UserError: if a shard is missing or damaged.
        """
        if self.card.pad_multiple:
            stored = self._dataset.row_lengths
            content, padded = (int(x.sum(dtype=np.int64)) for x in (stored.content_N, stored.padded_N))
            values = stored.content_N.astype(np.int64)
            return Lengths("rows without padding", values, len(values), content, padded - content)
        documents: list[NDArray[np.int64]] = []
        contents: list[int] = []
        prompts = False
        for ids in self._sample(rows):
            read = [self.sequence(int(i)) for i in ids]
            contents += [sequence.content for sequence in read]
            prompts |= any(Part.PROMPT in sequence.parts_L for sequence in read)
            if self.card.documents:
                documents += [np.bincount(s.document_L[s.document_L != PADDING]) for s in read]
            else:  # consecutive rows of one text
                parts = np.concatenate([sequence.parts_L for sequence in read])
                documents.append(np.diff(np.flatnonzero(parts == Part.END_OF_TEXT)))
        content = sum(contents)
        by_row = prompts and not self.card.documents
        return Lengths(
            "rows without padding" if by_row else "documents",
            np.array(contents) if by_row else np.concatenate(documents),
            len(contents),
            content,
            len(contents) * self.card.seq_len - content,
        )

    def _sample(self, rows: int) -> Iterator[NDArray[np.int64]]:
        """Yield the ids of at most `rows` rows, those of one shard together: consecutive ones, if they are one text."""
        sizes, offsets = self._dataset.samples_per_shard, self._dataset.sample_offset_per_shard
        shards = np.flatnonzero(sizes)
        chosen = shards[np.unique(np.linspace(0, len(shards) - 1, min(_SHARDS, rows)).astype(np.int64))]
        for shard in chosen:
            number = min(rows // len(chosen), int(sizes[shard]))
            step = int(sizes[shard]) // number if self.card.documents else 1
            yield offsets[shard] + np.arange(number) * step


def _content(tokens_L: NDArray[np.int64], eos_id: int) -> int:
    """Return the number of tokens of a fine-tuning row up to the end-of-text that ends its last response."""
    others = np.flatnonzero(tokens_L != eos_id)
    return min(int(others[-1]) + 2, len(tokens_L)) if len(others) else 0


def _find(location: str, split: str) -> tuple[str, str]:
    """Return the folder of shards that `location` denotes, and the output of prepare_data.py that it is a part of."""
    location = location.rstrip("/") or "/"
    if _has_card(location):
        if is_remote(location):
            return location, location.rpartition("/")[0]
        return location, os.path.dirname(os.path.abspath(location))
    folder = f"{location}/{split}"
    require(
        _has_card(folder),
        f"There are no shards in {location} or {folder} ({CARD} is missing); name an output of prepare_data.py, or a "
        "folder of shards.",
    )
    return folder, location


def _has_card(folder: str) -> bool:
    try:
        Storage(folder).read(CARD)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except UserError:
        raise
    except Exception as error:  # each remote file system has different error classes
        raise UserError(f"{folder}/{CARD} cannot be read ({one_line(error)}); check the access to it.") from None
    return True


def _read_counts(output: str) -> dict[str, Any]:
    try:
        counts = Storage(output).read_json(SUMMARY)
        if not isinstance(counts, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return {}
    except Exception as error:  # each remote file system has different error classes
        raise UserError(f"{output}/{SUMMARY} cannot be read ({one_line(error)}); restore or remove the file.") from None
    return counts


def _read_tokenizer(folder: str, scratch: str) -> DiffusionTokenizer:
    """Load a tokenizer, after copying it from a URL to `scratch`."""
    local = Path(scratch, TOKENIZER) if is_remote(folder) else Path(folder)
    try:
        if is_remote(folder):
            local.mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (local / name).write_bytes(Storage(folder).read(name))
        elif not (local / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{folder}/tokenizer.json is missing")
    except Exception as error:  # each remote file system has different error classes
        raise UserError(
            f"There is no tokenizer in {folder} ({one_line(error)}); name its folder with --tokenizer."
        ) from None
    return DiffusionTokenizer(str(local))


def _check_tokenizer(folder: str, card: Card, tokenizer: DiffusionTokenizer) -> None:
    stored, present = (card.mask_token_id, card.eos_token_id), (tokenizer.mask_id, tokenizer.eos_id)
    require(
        stored == present,
        f"The shards in {folder} have the mask and end-of-text tokens {stored[0]} and {stored[1]}, but the tokenizer "
        f"{present[0]} and {present[1]}; name the one that they were prepared with by --tokenizer.",
    )
