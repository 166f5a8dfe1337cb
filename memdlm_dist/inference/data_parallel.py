"""Data-parallel ranks: a map of batches over them, and the maximum that they agree on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from memdlm_dist.models.layout import Layout

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel ranks, of which this process is one.

    Attributes:
        group: None for a single rank.
        device: of the tensors that the group reduces.
    """

    dp_rank: int = 0
    dp_size: int = 1
    group: dist.ProcessGroup | None = None
    device: str | torch.device = "cpu"

    @classmethod
    def from_layout(cls, layout: Layout, device: torch.device) -> "DataParallel":
        """Return the data-parallel ranks of a layout."""
        mesh = layout.get_optional_mesh("batch")
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), device) if mesh else cls()

    def maximum(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.group is None:
            return number
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return int(found)

    def map_batches(
        self,
        items: Sequence[T],
        batch_size: int,
        work: Callable[[list[T], list[int]], list[R]],
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[R]:
        """Map `work` over all items, in batches of a size, each rank its share; returns all results on all ranks.

        Every rank has the same number of batches of the same size: the last items are done again to pad them.

        Args:
            items: the same on all ranks.
            work: (items, their numbers) -> a result for each.
            progress: callback, with the number of items done since.
        """
        results: list[tuple[int, R]] = []
        for first in range(0, len(items), batch_size * self.dp_size):
            numbers = range(first + self.dp_rank * batch_size, first + (self.dp_rank + 1) * batch_size)
            mine = [min(number, len(items) - 1) for number in numbers]
            if self.dp_size == 1:
                mine = list(dict.fromkeys(mine))
            results += zip(mine, work([items[number] for number in mine], mine), strict=True)
            progress(min(batch_size * self.dp_size, len(items) - first))
        gathered: list[list[tuple[int, R]]] = [results]
        if self.group is not None:
            gathered = [[] for _ in range(self.dp_size)]
            dist.all_gather_object(gathered, results, group=self.group)
        found = dict(pair for of_rank in gathered for pair in of_rank)
        return [found[number] for number in range(len(items))]
