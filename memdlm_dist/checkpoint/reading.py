"""Reading of untrusted DCP checkpoints: verifies every checksum and unpickles only classes that DCP writes."""

import io
import zipfile
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from memdlm_dist.compat.torch import EntryReader, FsspecEntryReader
from memdlm_dist.runtime.storage import is_remote


class _ChecksumMixin:
    """Mixin that verifies checksums; DCP's readers ignore them and would load a flipped bit."""

    def check_entry(self, file: Any, offset: int, length: int, name: str) -> io.BytesIO:
        """Return the bytes of one entry.

        Raises:
            OSError: if a checksum is wrong.
        """
        file.seek(offset)
        content = file.read(length)
        if not checksums_match(content):
            raise OSError(f"the file {name} is corrupt: a checksum is wrong")
        return io.BytesIO(content)


class CheckedReader(_ChecksumMixin, EntryReader):
    """DCP reader for a local folder that verifies checksums."""


class CheckedFsspecReader(_ChecksumMixin, FsspecEntryReader):
    """DCP reader for a folder at a URL that verifies checksums."""


class DataPlanner(DefaultLoadPlanner):
    """DCP load planner that unpickles values other than tensors with `weights_only=True`.

    It accepts numbers, strings, lists and dictionaries. DCP's own planner calls `torch.load` with `weights_only=False`.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is not a tensor.

        Raises:
            ValueError: if the state to load has a tensor with that name.
            pickle.UnpicklingError: if the value contains other classes.
        """
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict.get(name), Tensor):
            raise ValueError(f"{name} is a tensor, but not in the checkpoint")
        # The parent unpickles without restrictions, so it gets a copy that was serialised here.
        buffer = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), buffer)
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


def reader(location: str) -> EntryReader | FsspecEntryReader:
    """Return a checksum-verifying DCP reader for a checkpoint at a path or URL."""
    return CheckedFsspecReader(location) if is_remote(location) else CheckedReader(location)


def read_metadata(location: str) -> Metadata:
    """Read DCP's metadata.

    Raises:
        Exception: any error of reading or unpickling.
    """
    return reader(location).read_metadata()


def load_states(states: dict[str, Any], location: str, no_dist: bool = False) -> None:
    """Load a checkpoint into `states` in place; each rank reads only its own shards.

    Raises:
        CheckpointException: on every rank, with the failures of all ranks.
    """
    dcp.load(states, storage_reader=reader(location), planner=DataPlanner(), no_dist=no_dist)


def checksums_match(entry: bytes) -> bool:
    """Return whether all checksums in an entry, which is a zip archive, are correct."""
    try:
        return zipfile.ZipFile(io.BytesIO(entry)).testzip() is None
    except zipfile.BadZipFile:
        return False
