"""Data-parallel inference: batches divided among ranks, and a maximum over ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from memdlm_dist.models.layout import Layout

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DataParallel:
    """Data-parallel rank of this process, with the process group.

    Attributes:
        group: process group of the data-parallel ranks; None for a single rank.
        device: device of the tensors that the group reduces.
    """

    dp_rank: int = 0
    dp_size: int = 1
    group: dist.ProcessGroup | None = None
    device: str | torch.device = "cpu"

    @classmethod
    def from_layout(cls, layout: Layout, device: torch.device) -> "DataParallel":
        """Build from the batch mesh of a layout; a single rank if the layout has none."""
        mesh = layout.get_optional_mesh("batch")
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), device) if mesh else cls()

    def maximum(self, number: int) -> int:
        """Return the maximum of `number` over all data-parallel ranks."""
        if self.group is None:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def share(self, count: int) -> range:
        """Return this rank's share of `count` items, dealt in turn."""
        return range(self.dp_rank, count, self.dp_size)

    def gather(self, value: T) -> list[T]:
        """Return the values of all data-parallel ranks, in order of the ranks."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.dp_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def map_batches(
        self,
        items: Sequence[T],
        batch_size: int,
        work: Callable[[list[T], list[int]], list[R]],
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[R]:
        """Map `work` over all items in batches divided among ranks; return all results, in order, on all ranks.

        Several ranks all get the same number of full batches: the last item is repeated as padding.

        Args:
            items: all items, equal on all ranks.
            work: (items of a batch, their indices) -> one result per item.
            progress: callback after each batch, with the number of items that all ranks have completed since the last
                call.
        """
        results: list[tuple[int, R]] = []
        for first in range(0, len(items), batch_size * self.dp_size):
            indices = range(first + self.dp_rank * batch_size, first + (self.dp_rank + 1) * batch_size)
            mine = [min(index, len(items) - 1) for index in indices]
            if self.dp_size == 1:
                mine = list(dict.fromkeys(mine))
            results += zip(mine, work([items[index] for index in mine], mine), strict=True)
            progress(min(batch_size * self.dp_size, len(items) - first))
        result_of = dict(pair for of_rank in self.gather(results) for pair in of_rank)
        return [result_of[index] for index in range(len(items))]
