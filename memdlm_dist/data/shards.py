"""Tokenised shards on disk: MDS files plus a card that says what is in them."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from streaming import MDSWriter

from memdlm_dist.data.sequences import Sequence
from memdlm_dist.errors import UserError

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


class ShardWriter:
    """Writes sequences as MDS shards, next to where they belong; they take their place when all is well.

    Tokens are stored in 2 bytes where the vocabulary allows, else 4; the maskable flags as bits. If the
    context is left with an error, nothing of it stays and whatever `folder` held before is untouched.

    Args:
        folder: replaced as a whole at the end.
        card: what the folder will hold; its `sequences` is counted here.
        size_limit: bytes of one shard, at most.
    """

    def __init__(self, folder: Path, card: Card, size_limit: int = 1 << 26):
        self._folder, self.card = folder, card
        self._partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # of a preparation that was killed
        self._dtype = np.uint16 if card.vocab_size <= 1 << 16 else np.uint32
        columns = {"tokens": f"ndarray:{self._dtype.__name__}:{card.seq_len}", "maskable": "bytes"}
        self._writer = MDSWriter(
            out=str(self._partial), columns=columns, hashes=[HASH], size_limit=size_limit, progress_bar=False
        )

    def write(self, sequence: Sequence) -> None:
        maskable = np.packbits(sequence.maskable_L).tobytes()
        self._writer.write({"tokens": sequence.tokens_L.astype(self._dtype), "maskable": maskable})
        self.card = replace(self.card, sequences=self.card.sequences + 1)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        self._writer.__exit__(error_type, error, traceback)
        if error_type is None:
            (self._partial / CARD).write_text(json.dumps(asdict(self.card), indent=2) + "\n")
            shutil.rmtree(self._folder, ignore_errors=True)
            self._partial.rename(self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def read_card(location: str) -> Card:
    """The card of a folder or URL of shards.

    Raises:
        UserError: if there is none or it cannot be read.
    """
    url = f"{location.rstrip('/')}/{CARD}"
    try:
        with fsspec.open(url, "r") as file:
            return Card(**json.load(file))
    except FileNotFoundError:
        raise UserError(
            f"There are no shards in {location} ({CARD} is missing); prepare them with tools/prepare_data.py "
            "or correct data.train and data.validation."
        ) from None
    except (OSError, ImportError, ValueError, TypeError) as error:
        raise UserError(f"The shards' card {url} cannot be read: {error}.") from None
