"""The collectives of a piece of code, by kind and process group. A helper of bench.py and of the tests."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memdlm_dist.compat.torch import TorchDispatchMode, operator_name, tree_leaves

# Operators by which torch.distributed, FSDP2 and DTensor communicate.
_KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "_c10d_functional::all_reduce": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::alltoall_": "all_to_all",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "_c10d_functional::broadcast": "broadcast",
    "c10d::scatter_": "scatter",
    "c10d::gather_": "gather",
    "c10d::send": "send",
    "c10d::recv_": "recv",
    "_dtensor::shard_dim_alltoall": "all_to_all",
}
_LOCAL = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """While active, lists (kind, name of the process group, largest argument's number of elements).

    A compiled region is not looked into; run it uncompiled. (torch's CommDebugMode breaks around
    `torch.autograd.grad`.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator_name(operator)
        if name in _KINDS:
            leaves = tree_leaves((args, kwargs or {}))
            elements = max((x.numel() for x in leaves if isinstance(x, Tensor)), default=0)
            self.found.append((_KINDS[name], _group_name(leaves), elements))
        elif name.startswith(("c10d::", "_c10d_functional::")) and name not in _LOCAL:
            raise RuntimeError(f"an operator of torch.distributed that is not known here: {name}")
        return operator(*args, **(kwargs or {}))

    def on(self, *groups: ProcessGroup) -> list[tuple[str, int]]:
        """(kind, elements) of the collectives on some groups, in the order in which they were issued."""
        names = {group.group_name for group in groups}
        return [(kind, elements) for kind, group, elements in self.found if group in names]


def by_kind(found: list[tuple[str, int]]) -> Counter[str]:
    """The number of collectives of each kind."""
    return Counter(kind for kind, _ in found)


def _group_name(leaves: list[Any]) -> str:
    for x in leaves:
        if isinstance(x, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(x).group_name
            except RuntimeError:  # a reduction operator, say
                continue
    return next(x for x in leaves if isinstance(x, str) and x not in ("sum", "avg", "max", "min"))
