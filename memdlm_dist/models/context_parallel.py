"""Context parallelism: attention over rows that are sharded along the sequence.

Each of C ranks holds one of C consecutive slices of every row. Only attention combines tokens, so only attention
changes. It is not causal: all slices cost the same, and no load balancing is needed.

Shapes: B rows, L tokens of a whole row, l = L / C tokens per rank, H heads of this tensor-parallel rank, d head dim,
h heads per rank after the exchange (queries, keys and values concatenated).
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
    """Attention that exchanges tokens for heads with all-to-alls (Jacobs et al. 2023, arXiv 2309.14509).

    Each rank computes H / C heads over whole rows, so any mask over whole rows still applies. A pass has two
    all-to-alls, one for queries, keys and values together and one for the output. Each rank sends (C - 1) / C of its
    tensors.

    Args:
        kernel: attention on `[B, H / C, L, d]`.
        mesh: one-dimensional context-parallel mesh. Its size C must divide the number of query and of key heads.
    """

    def __init__(self, kernel: nn.Module, mesh: DeviceMesh):
        super().__init__()
        self.kernel = kernel
        self.group, self.cp_size = mesh.get_group(), mesh.size()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, mask: Mask | None = None) -> Tensor:
        """Return the attention output `[B, H, l, d]` of this rank's tokens.

        Args:
            q, k, v: `[B, H, l, d]`.
            mask: over whole rows.
        """
        heads = [x.shape[1] // self.cp_size for x in (q, k, v)]
        qkv_BChld = torch.cat([x.unflatten(1, (self.cp_size, -1)) for x in (q, k, v)], dim=2)
        qkv_BhLd = self._exchange(qkv_BChld.movedim(1, 0)).movedim(0, 2).flatten(2, 3)
        y = self.kernel(*qkv_BhLd.split(heads, dim=1), enable_gqa=enable_gqa, mask=mask)
        return self._exchange(y.unflatten(2, (self.cp_size, -1)).movedim(2, 0)).movedim(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        """Send slice c of `[C, ...]` to rank c, and return the slices that all ranks send to this one."""
        return all_to_all(x.contiguous(), self.group)


def apply_cp(attentions: Sequence[BidirectionalAttention], mesh: DeviceMesh, method: Method, rotation: Any) -> None:
    """Apply context parallelism to attention modules, so that they attend to the tokens of all ranks of a mesh.

    Args:
        method: "ulysses", or "ring" for torch's ring attention, which takes no mask and has kernels only for CUDA.
        rotation: `parallelism.context_parallel_rotate_method`, how "ring" passes keys and values between ranks.
    """
    if method == "ulysses":
        for attention in attentions:
            attention.inner_attention = Ulysses(attention.inner_attention, mesh)
        return
    ring_attention([attention.inner_attention for attention in attentions], mesh, rotation)
