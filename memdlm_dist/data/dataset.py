"""Dataset of clean tokens over one or several streams of shards, local or cached from a URL."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from streaming import Stream

from memdlm_dist.compat import streaming
from memdlm_dist.data import downloads, row_lengths, shard_index, shared_memory
from memdlm_dist.data.output import LENGTHS
from memdlm_dist.data.row_lengths import RowLengths, TokenShares
from memdlm_dist.data.row_shape import UNIFORM, RowShape
from memdlm_dist.data.settings import Data
from memdlm_dist.data.shards import HASH
from memdlm_dist.data.stream_shares import StreamShare
from memdlm_dist.errors import UserError, require
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import is_remote

# Key of a sample that carries an error message instead of tokens.
ERROR_KEY = "error"

_REMEDY = "prepare the data anew, or delete the file if it is a cached copy"


class TokenDataset(streaming.ArrangedDataset):
    """StreamingDataset whose samples hold clean tokens, labels and the global sample id.

    A sample is `{"tokens": int64 [L], "labels": int64 [L], "sample_id": int}`. Labels are the tokens at maskable
    positions and -100 elsewhere; with `mask_prompt` every token of a document is maskable. With `documents` a sample
    also has the key "documents", int64 [L]: the number of each token's document in the row, and `PADDING` at padding,
    as in `Documents.number_BL`.

    Rows may have different lengths. While the data set is iterated, a row is filled up with `PADDING` to the length of
    its micro-batch, which is the same on all ranks.

    When a shard is first read, its size and checksum are compared with the index.

    Args:
        check_hash: name of the checksum; empty for no check.
        documents: True if any stream has packed documents or rows of different lengths; each row of the other streams
            is then one document.
        buckets: possible lengths of a micro-batch, from `row_lengths.buckets`; empty if all rows have one length.
        global_batch_size: rows per optimizer step, for `group_by_length`.
        group_by_length: bring rows of similar length together.
        mask_prompt: prompts are maskable, too.
        kwargs: passed on to `ArrangedDataset`, such as `group_size`.
    """

    def __init__(
        self,
        *,
        check_hash: str,
        documents: bool = False,
        buckets: tuple[int, ...] = (),
        global_batch_size: int = 1,
        group_by_length: bool = False,
        mask_prompt: bool = False,
        **kwargs: Any,
    ):
        super().__init__(arranges=bool(buckets), **kwargs)
        self._check_hash, self._documents, self._buckets = check_hash, documents, buckets
        self._global_batch_size, self._group_by_length = global_batch_size, group_by_length
        self._mask_prompt = mask_prompt
        self._checked: set[int] = set()

    @cached_property
    def row_lengths(self) -> RowLengths:
        """Lengths of all rows; only for a data set with rows of different lengths."""
        seq_len = self._buckets[-1]
        parts = []
        for stream, rows in zip(self.streams, self.samples_per_stream, strict=True):
            folder = Path(stream.local, stream.split)
            varies = (folder / LENGTHS).is_file()
            parts.append(row_lengths.read(str(folder), rows, seq_len) if varies else np.full((rows, 2), seq_len))
        content_N, padded_N = np.concatenate(parts).astype(np.uint32).T
        return RowLengths(content_N, padded_N, self._buckets)

    def arrange(self, ids_E: NDArray[np.int64], epoch: int, first: int, rows: int) -> tuple[NDArray[np.int64], ...]:
        """Return the ids of micro-batches of all ranks, grouped by length if asked, and their lengths; see the base.

        The incomplete last global batch is dropped.
        """
        size = self._global_batch_size
        if self._group_by_length:
            ids_E = self.row_lengths.group(ids_E[: len(ids_E) // size * size], size, self.shuffle_seed, epoch)
        ids_E = ids_E[first:]  # not a multiple of `size` after an accepted change of the global batch size
        ids_Tn = ids_E[: len(ids_E) // size * size].reshape(-1, rows)
        return ids_Tn, self.row_lengths.bucket(ids_Tn)

    def token_shares(self, rows: int) -> TokenShares:
        """Count content, padding and fill of the first epoch, in micro-batches of `rows` rows over all ranks."""
        ids_Tn, _ = self.arrange(self.epoch_order(0), 0, 0, rows)
        return self.row_lengths.shares(ids_Tn)

    def stream_shares(self) -> list[StreamShare]:
        """Return the number of rows of each stream, and how many samples an epoch draws from it."""
        return [
            StreamShare(stream.remote or stream.local, int(rows), int(stream.choose))
            for stream, rows in zip(self.streams, self.samples_per_stream, strict=True)
        ]

    def fill_up(self, sample: dict[str, Any], length: int) -> dict[str, Any]:
        """Fill a sample up to `length` tokens; the added tokens belong to no document and have no label.

        Raises:
            UserError: if the sample has not the length that `row_lengths` states.
        """
        tokens, stated = len(sample["tokens"]), int(self.row_lengths.padded_N[sample["sample_id"]])
        require(
            tokens == stated,
            f"Sample {sample['sample_id']} has {tokens} tokens, but {LENGTHS} of its shards states {stated}; "
            f"{_REMEDY}.",
        )
        missing = length - tokens
        fills = {"tokens": 0, "labels": IGNORE_INDEX, "documents": PADDING}
        padded = {key: F.pad(sample[key], (0, missing), value=value) for key, value in fills.items()}
        return sample | padded

    def fingerprint(self) -> str:
        """Return a hash of the shard entries in all indices (files, sizes, checksums), row lengths and proportions.

        The location of the shards does not enter the hash, so they can be moved.
        """
        state = hashlib.sha256()
        for stream in self.streams:
            index = json.loads(Path(stream.local, stream.split, "index.json").read_text())
            state.update(json.dumps([index["shards"], stream.proportion], sort_keys=True).encode())
            if (lengths := Path(stream.local, stream.split, LENGTHS)).is_file():
                state.update(lengths.read_bytes())
        return state.hexdigest()[:16]

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Read one sample by its global id; on the first access to a shard, also check the shard.

        Raises:
            UserError: naming the shard, if it is missing or corrupt or the sample cannot be read.
        """
        sample_id = int(sample_id)
        try:
            # The parent comes first: it downloads a shard that is not cached yet.
            sample = super().get_item(sample_id, retry)
            shard_id, _ = self.spanner[sample_id]
            if shard_id not in self._checked:
                self._check_shard(shard_id)
                self._checked.add(shard_id)
            tokens = torch.from_numpy(sample["tokens"].astype(np.int64))
            flags = np.unpackbits(np.frombuffer(sample["maskable"], np.uint8), count=len(tokens))
            numbers = self._document_numbers(sample, len(tokens))
        except UserError:
            streaming.stop_threads(self)
            raise
        except Exception as error:
            streaming.stop_threads(self)
            shard_id, _ = self.spanner[sample_id]
            self._check_shard(shard_id)  # raises a clearer error if the shard is corrupt
            raise UserError(
                f"Sample {sample_id} in {self._shard_path(shard_id)} cannot be read ({one_line(error)}); {_REMEDY}."
            ) from None
        maskable = flags.astype(np.bool_)
        if self._mask_prompt:
            maskable |= numbers != PADDING
        labels = torch.where(torch.from_numpy(maskable), tokens, IGNORE_INDEX)
        documents = {"documents": torch.from_numpy(numbers)} if self._documents else {}
        return {"tokens": tokens, "labels": labels, "sample_id": sample_id, **documents}

    @staticmethod
    def _document_numbers(sample: dict[str, Any], length: int) -> NDArray[np.int64]:
        """Return the number of each token's document, int64 [L]; `PADDING` at padding."""
        if "documents" not in sample:
            return np.zeros(length, dtype=np.int64)
        sizes = np.frombuffer(sample["documents"], np.uint32)
        numbers = np.full(length, PADDING, dtype=np.int64)
        numbers[: sizes.sum()] = np.repeat(np.arange(len(sizes)), sizes)
        return numbers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of an epoch; after a UserError, yield samples that carry its message.

        The loader's worker processes pass samples on unchanged, but reduce an exception to the text of its traceback.
        """
        try:
            for number, sample in enumerate(super().__iter__()):
                lengths = self.batch_lengths
                yield sample if lengths is None else self.fill_up(sample, int(lengths[number // self.batch_size]))
        except UserError as error:
            # Repeated without end, because the loader waits for a full batch.
            yield from repeat({ERROR_KEY: str(error)})

    def check_local_shards(self) -> None:
        """Check that the shards of all streams without a remote exist and have the size in the index.

        Raises:
            UserError: if a shard is missing or has another size; names the first.
        """
        for shard_id, stream_id in enumerate(self.stream_per_shard):
            if self.streams[stream_id].remote is None:
                self._check_size(shard_id)

    def _shard_path(self, shard_id: int) -> str:
        shard = self.shards[shard_id]
        return os.path.join(shard.dirname, shard.split, shard.raw_data.basename)

    def _check_size(self, shard_id: int) -> None:
        path, info = self._shard_path(shard_id), self.shards[shard_id].raw_data
        if not os.path.isfile(path):
            raise UserError(f"The shard {path} is missing; {_REMEDY}.")
        size = os.path.getsize(path)
        if size != info.bytes:
            raise UserError(f"The shard {path} is corrupt: {size} bytes instead of {info.bytes}; {_REMEDY}.")

    def _check_shard(self, shard_id: int) -> None:
        self._check_size(shard_id)
        path, info = self._shard_path(shard_id), self.shards[shard_id].raw_data
        if self._check_hash:
            expected = info.hashes.get(self._check_hash)
            if expected is None:
                raise UserError(
                    f"The shard {path} has no {self._check_hash} checksum (it has {', '.join(info.hashes) or 'none'}); "
                    "set data.validate_hash to one that it has, or to '' for no check."
                )
            if streaming.checksum(self._check_hash, Path(path).read_bytes()) != expected:
                raise UserError(f"The shard {path} is corrupt: its {self._check_hash} checksum is wrong; {_REMEDY}.")


def open_dataset(
    data: Data, locations: list[str], proportions: list[float], rows: RowShape = UNIFORM, **options: Any
) -> TokenDataset:
    """Open a dataset over one or several streams; streams at a URL are cached under `data.cache_folder`.

    A file:// URL is cached too, for example a folder on a slow network file system.

    Args:
        rows: shape of the rows, from `check_cards`.
        options: passed on to `TokenDataset`.

    Raises:
        UserError: if streaming cannot open a stream.
    """
    shares = [{"proportion": share} for share in proportions] or [{} for _ in locations]
    streams, folders, cached = [], [], []
    for location, share in zip(locations, shares, strict=True):
        remote = location if is_remote(location) else None
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        local = os.path.join(data.cache_folder, name) if remote else location
        folders.append(os.path.abspath(local))
        if remote:
            cached.append(folders[-1])
            _register_scheme(location)
        streams.append(
            Stream(
                remote=remote.removeprefix("file://") if remote else None,
                local=local,
                download_retry=data.download_retry,
                download_timeout=data.download_timeout,
                validate_hash=HASH if remote and data.validate_hash == HASH else None,
                **share,
            )
        )
    shared_memory.choose_prefix_by_run()
    is_local_rank_0 = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if is_local_rank_0:
        shards = {}
        for location, stream in zip(locations, streams, strict=True):
            shards[location] = shard_index.prepare(location, stream.local, stream.remote is not None)
            if location in rows.varying:
                row_lengths.fetch(location, stream.local)
        # The limit must leave room for shards of local streams too, because streaming counts them.
        _check_cache_limit(data.cache_limit, [s for entries in shards.values() for s in entries] if cached else [])
        shared_memory.remove_leftovers(folders, cached)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # before any rank looks for a free name in shared memory
    try:
        dataset = TokenDataset(
            streams=streams,
            cache_limit=data.cache_limit if cached else None,
            check_hash=data.validate_hash,
            documents=rows.documents,
            buckets=rows.buckets,
            **options,
        )
    except Exception as error:  # streaming raises RuntimeError, ValueError, OSError, client errors ...
        raise UserError(
            f"The shards in {', '.join(locations)} cannot be opened ({one_line(error)}); check the "
            "location and the access to it."
        ) from None
    if is_local_rank_0:
        dataset.check_local_shards()
    return dataset


def _check_cache_limit(limit: str, shards: list[dict[str, Any]]) -> None:
    """Check that the cache can hold the shards that are in use at the same time.

    Raises:
        UserError: if the limit is not a size, or is too low.
    """
    if not limit or not shards:
        return
    try:
        size = streaming.size_in_bytes(limit)
    except ValueError:
        raise UserError(f"data.cache_limit = {limit!r} is not a size; write it as in 200gb.") from None
    # Four: the shard that is read, the next one, one that is being downloaded and one that is being deleted.
    least = 4 * max(sum(shard[key]["bytes"] for key in ("raw_data", "zip_data") if shard[key]) for shard in shards)
    if size < least:
        raise UserError(
            f"data.cache_limit = {limit!r} is less than four of the largest shards, {least:,} bytes; raise it, or "
            "set it to '' for no limit."
        )


def _register_scheme(location: str) -> None:
    try:
        downloads.register(location)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"The shards in {location} cannot be opened ({one_line(error)}); correct the URL, or install the package "
            "that it needs."
        ) from None
