"""Row slices: weights that are one tensor in Hugging Face's files and several here, such as fused projections.

A slice has the name of the whole tensor with its rows: `layers.0.attention.query_key_value.weight[0:2048]`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


class RowSlice(NamedTuple):
    """Rows `start .. stop - 1` of a tensor in a file."""

    whole: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the slice."""
        return f"{self.whole}[{self.start}:{self.stop}]"

    @classmethod
    def parse(cls, name: str) -> "RowSlice | None":
        """Return the slice that a name stands for; None for the name of a whole tensor."""
        match = _SLICE.fullmatch(name)
        return cls(match[1], int(match[2]), int(match[3])) if match else None


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the slices of every tensor, in the order of their rows; the other tensors stay as they are.

    Sharded slices are gathered and sharded again, one tensor after the other: a collective call.

    Args:
        tensors: whole tensors, and all slices of others, by name.
    """
    result: dict[str, Tensor] = {}
    slices: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        part = RowSlice.parse(name)
        if part is None:
            result[name] = tensor
            continue
        slices.setdefault(part.whole, []).append((part.start, tensor))
        result.setdefault(part.whole, tensor)  # keeps the place of the first slice
    for whole, parts in slices.items():
        result[whole] = _concatenate([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
    return result


def _concatenate(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    if not isinstance(first, DTensor):
        return torch.cat(parts)
    rows = torch.cat([part.full_tensor() for part in parts if isinstance(part, DTensor)])
    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in first.placements]
    return distribute_tensor(rows, first.device_mesh, placements, src_data_rank=None)
