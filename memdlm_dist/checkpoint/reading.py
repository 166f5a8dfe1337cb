"""Reading a DCP checkpoint as data: every checksum compared, and no class unpickled but those that DCP writes."""

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


class _Checked:
    """Checks of checksums for DCP's readers, which do not look at them: a flipped bit would be trained on."""

    def check_entry(self, file: Any, offset: int, length: int, name: str) -> io.BytesIO:
        file.seek(offset)
        content = file.read(length)
        if not is_sound(content):
            raise OSError(f"the file {name} is corrupt: a checksum is wrong")
        return io.BytesIO(content)


class CheckedReader(_Checked, EntryReader):
    """DCP's reader of a folder on disk, with checksums."""


class CheckedFsspecReader(_Checked, FsspecEntryReader):
    """DCP's reader of a folder at a URL, with checksums."""


class DataPlanner(DefaultLoadPlanner):
    """DCP's planner, which unpickles what is no tensor as data alone: numbers, texts, lists and dictionaries.

    DCP's own calls `torch.load` with `weights_only=False`.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value that is no tensor.

        Raises:
            ValueError: if the model or the optimizer has a tensor of that name.
            pickle.UnpicklingError: if it holds anything but data.
        """
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict.get(name), Tensor):
            raise ValueError(f"{name} is a tensor, and not one in the checkpoint")
        # The parent unpickles without limits; what it gets was written here.
        again = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)


def reader(location: str) -> EntryReader | FsspecEntryReader:
    """DCP's reader of a checkpoint, which checks what it reads."""
    return CheckedFsspecReader(location) if is_remote(location) else CheckedReader(location)


def read_metadata(location: str) -> Metadata:
    """Read DCP's metadata.

    Raises:
        Exception: whatever reading and unpickling raise.
    """
    return reader(location).read_metadata()


def load_states(states: dict[str, Any], location: str, no_dist: bool = False) -> None:
    """Fill states from a checkpoint, each rank its own part.

    Raises:
        CheckpointException: on every rank, what failed on any.
    """
    dcp.load(states, storage_reader=reader(location), planner=DataPlanner(), no_dist=no_dist)


def is_sound(entry: bytes) -> bool:
    """Return whether the checksums of an entry, a zip archive, are right."""
    try:
        return zipfile.ZipFile(io.BytesIO(entry)).testzip() is None
    except zipfile.BadZipFile:
        return False
