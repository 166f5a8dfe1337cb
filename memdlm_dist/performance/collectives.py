"""Recorder of collectives, by kind and process group, for bench.py and the tests."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from memdlm_dist.compat.torch import TorchDispatchMode, operator_name, tree_leaves

# Communication operators of torch.distributed, FSDP2 and DTensor.
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
    """Context that records each collective as (kind, process group name, elements of the largest argument).

    It does not see collectives inside compiled regions; run them uncompiled. (torch's CommDebugMode breaks around
    `torch.autograd.grad`.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator_name(operator)
        if name in _KINDS:
            leaves = tree_leaves((args, kwargs or {}))
            elements = max((x.numel() for x in leaves if isinstance(x, Tensor)), default=0)
            self.issued.append((_KINDS[name], _group_name(leaves), elements))
        elif name.startswith(("c10d::", "_c10d_functional::")) and name not in _LOCAL:
            raise RuntimeError(f"{name} is an unknown operator of torch.distributed; add it to collectives.py.")
        return operator(*args, **(kwargs or {}))

    def on(self, *groups: ProcessGroup) -> list[tuple[str, int]]:
        """Return (kind, elements) of the collectives on the given process groups, in the order of their issue."""
        names = {group.group_name for group in groups}
        return [(kind, elements) for kind, group, elements in self.issued if group in names]


def by_kind(collectives: list[tuple[str, int]]) -> Counter[str]:
    """Count the collectives by kind."""
    return Counter(kind for kind, _ in collectives)


def _group_name(leaves: list[Any]) -> str:
    for x in leaves:
        if isinstance(x, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(x).group_name
            except RuntimeError:  # not a process group, but for example a reduction operator
                continue
    return next(x for x in leaves if isinstance(x, str) and x not in ("sum", "avg", "max", "min"))
