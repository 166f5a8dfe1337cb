"""Tokenised shards on disk: MDS files plus a card that says what is in them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

from memdlm_dist.data.sequences import Sequence
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.storage import Storage

CARD = "memdlm.json"
HASH = "xxh64"


@dataclass(frozen=True)
class Card:
    """What a folder of shards holds, beside its index.json."""

    seq_len: int
    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    sequences: int = 0
    documents: bool = False  # the rows know their documents


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` once the context is left without an error.

    Otherwise nothing of it stays, and whatever `folder` held before is untouched.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class ShardWriter:
    """Writes rows as MDS shards; the folder is complete once the context is left without an error.

    Tokens are stored in 2 bytes where the vocabulary allows, else 4; the maskable flags as bits; the lengths of the
    documents, if the rows know them, in 4 bytes each.

    Args:
        folder: new.
        card: what the folder will hold; its `sequences` is counted here.
        size_limit: bytes of one shard, at most.
    """

    def __init__(self, folder: Path, card: Card, size_limit: int = 1 << 26):
        self._folder, self.card = folder, card
        self._dtype = np.uint16 if card.vocab_size <= 1 << 16 else np.uint32
        columns = {"tokens": f"ndarray:{self._dtype.__name__}:{card.seq_len}", "maskable": "bytes"}
        if card.documents:
            columns["documents"] = "bytes"
        self._writer = MDSWriter(
            out=str(folder), columns=columns, hashes=[HASH], size_limit=size_limit, progress_bar=False
        )

    def write(self, row: Sequence) -> None:
        sample = {"tokens": row.tokens_L.astype(self._dtype), "maskable": np.packbits(row.maskable_L).tobytes()}
        if self.card.documents:
            # A row that was not packed is one document.
            sample["documents"] = np.array(row.documents or (self.card.seq_len,), dtype=np.uint32).tobytes()
        self._writer.write(sample)
        self.card = replace(self.card, sequences=self.card.sequences + 1)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        self._writer.__exit__(error_type, error, traceback)
        if error_type is None:
            (self._folder / CARD).write_text(json.dumps(asdict(self.card), indent=2) + "\n")


def read_card(location: str) -> Card:
    """The card of a folder or URL of shards.

    Raises:
        UserError: if there is none or it cannot be read.
    """
    storage = Storage(location)
    try:
        return Card(**storage.read_json(CARD))
    except FileNotFoundError:
        raise UserError(
            f"There are no shards in {location} ({CARD} is missing); prepare them with tools/prepare_data.py "
            "or correct data.train and data.validation."
        ) from None
    except Exception as error:  # every remote file system raises its own
        raise UserError(f"The shards' card {storage.url(CARD)} cannot be read: {error}.") from None
