"""Attention over rows whose tokens are spread over the ranks of a context-parallel group.

Every rank has one of C consecutive parts of each row; all else in a layer is token by token. Attention is not causal,
so that the parts are the same work and none has to be balanced against another.

Shapes: B rows, L tokens of them, l = L / C on each of C ranks, H heads (of this tensor-parallel rank), d head.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist.compat.torch import all_to_all
from memdlm_dist.compat.torchtitan import ring_attention
from memdlm_dist.models.attention import BidirectionalAttention, Mask

Method = Literal["ulysses", "ring"]


class Ulysses(nn.Module):
    """An attention kernel for which tokens are exchanged for heads (Jacobs et al. 2023, arXiv 2309.14509).

    Each rank computes H / C heads of the whole rows, so that any mask over rows applies as it is. Two all-to-alls in
    a pass: queries, keys and values together, and the output; each rank sends (C - 1) / C of what it has.

    Args:
        kernel: attention on `[B, H / C, L, d]`.
        mesh: one-dimensional. C must divide the heads of queries and of keys.
    """

    def __init__(self, kernel: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.kernel = kernel
        self.group, self.ranks = mesh.get_group(), mesh.size()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, mask: Mask | None = None) -> Tensor:
        """Attention's output `[B, H, l, d]`.

        Args:
            q, k, v: `[B, H, l, d]`.
            mask: over whole rows.
        """
        heads = [x.shape[1] // self.ranks for x in (q, k, v)]
        parts = torch.cat([x.unflatten(1, (self.ranks, -1)) for x in (q, k, v)], dim=2)  # [B, C, h, l, d]
        whole = self._exchange(parts.movedim(1, 0)).movedim(0, 2).flatten(2, 3)  # [B, h, L, d]
        y = self.kernel(*whole.split(heads, dim=1), enable_gqa=enable_gqa, mask=mask)
        return self._exchange(y.unflatten(2, (self.ranks, -1)).movedim(2, 0)).movedim(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Part c of `[C, ...]` goes to rank c; returned are all ranks' parts for this one."""
        return all_to_all(x.contiguous(), self.group)


def apply_cp(attentions: Sequence[BidirectionalAttention], mesh: DeviceMesh, method: Method, rotation: Any) -> None:
    """Make attention modules attend to the tokens of all ranks of a mesh.

    Args:
        method: "ring" is torch's ring attention, which takes no mask and has kernels for CUDA alone.
        rotation: how "ring" passes keys and values on, `parallelism.context_parallel_rotate_method`.
    """
    if method == "ulysses":
        for attention in attentions:
            attention.inner_attention = Ulysses(attention.inner_attention, mesh)
        return
    ring_attention([attention.inner_attention for attention in attentions], mesh, rotation)
