"""DCP's reader of Hugging Face folders, extended to row slices of tensors; each rank reads only its rows."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from memdlm_dist.models.row_slices import RowSlice


class SliceReader(HuggingFaceStorageReader):
    """Reader of a folder, in which row slices of its tensors can be requested like tensors.

    Args:
        path: the folder.
        names: names of the tensors and slices to read.
    """

    def __init__(self, path: str, names: Iterable[str]):
        super().__init__(path)
        self._slices = {name: part for name in names if (part := RowSlice.parse(name))}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata of the folder's tensors, and of the slices as tensors of their own."""
        metadata: Metadata = super().read_metadata(*args, **kwargs)
        for name, part in self._slices.items():
            whole: Any = metadata.state_dict_metadata[part.whole]
            size = torch.Size([part.stop - part.start, *whole.size[1:]])
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            metadata.state_dict_metadata[name] = TensorStorageMetadata(whole.properties, size, [chunk])
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the tensors of a plan, and the slices from the tensors that they belong to."""
        return super().read_data(replace(plan, items=[self._in_whole(item) for item in plan.items]), planner)

    def _in_whole(self, item: ReadItem) -> ReadItem:
        part = self._slices.get(item.storage_index.fqn)
        if part is None:
            return item
        rows, *others = item.storage_offsets
        index = MetadataIndex(part.whole, [0] * len(item.storage_offsets))
        return replace(item, storage_index=index, storage_offsets=torch.Size([part.start + rows, *others]))
