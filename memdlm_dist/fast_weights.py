"""Fast weights: the parametric memory, a tree of plain tensors that the inner loop writes.

They are arguments of the forward pass, never parameters or module state. So the optimizer, FSDP2,
checkpoints and `state_dict` know nothing of them, and they are gone when the step is over.

Shapes: G sets of fast weights (one per sequence, or one per micro-batch), B sequences, L tokens,
R rank. A linear with its fast weights computes y = W x + (alpha / R) B (A x).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from memdlm_dist import keyed_random
from memdlm_dist.keyed_random import Stream


class LowRank(NamedTuple):
    """Fast weights of one linear."""

    A_GRi: Tensor
    B_GoR: Tensor
    scale: float  # alpha / R


# Layer name -> target name ("gate", "up", "down") -> fast weights of that linear.
FastWeights = dict[str, dict[str, LowRank]]


@dataclass(frozen=True)
class AdaptedLinear:
    """Where fast weights attach: one linear of the backbone."""

    layer: str
    target: str
    in_features: int
    out_features: int
    row_wise: bool  # tensor-parallel style: row-wise shards `in`, column-wise shards `out`


def draw(
    linears: Sequence[AdaptedLinear],
    rank: int,
    alpha: float,
    keys_G: Tensor,
    tp_mesh: DeviceMesh | None = None,
) -> FastWeights:
    """Fresh fast weights: A ~ kaiming_uniform(a = sqrt 5), that is U(-1/sqrt(in), 1/sqrt(in)); B = 0.

    Args:
        linears: the linears to adapt.
        keys_G: one key per set, from `keyed_random.key`; the draw lands on its device, in float32.
        tp_mesh: one-dimensional; makes DTensors with A replicated and B sharded on its rows for
            column-wise linears, A sharded on its columns and B replicated for row-wise ones. Every
            rank draws only its own part of A.
    """
    fast: FastWeights = {}
    size, position = (tp_mesh.size(), tp_mesh.get_local_rank()) if tp_mesh else (1, 0)
    for number, linear in enumerate(linears):
        in_local = linear.in_features // size if linear.row_wise else linear.in_features
        out_local = linear.out_features if linear.row_wise else linear.out_features // size
        column = torch.arange(in_local, device=keys_G.device) + (position * in_local if linear.row_wise else 0)
        element_Ri = torch.arange(rank, device=keys_G.device).unsqueeze(1) * linear.in_features + column
        u_Gn = keyed_random.uniform(keys_G + number, element_Ri.flatten(), torch.float32)
        A_GRi = ((2 * u_Gn - 1) / math.sqrt(linear.in_features)).unflatten(1, (rank, in_local))
        B_GoR = torch.zeros(len(keys_G), out_local, rank, device=keys_G.device)
        if tp_mesh is not None:
            a_placement, b_placement = (Shard(2), Replicate()) if linear.row_wise else (Replicate(), Shard(1))
            A_GRi = DTensor.from_local(A_GRi, tp_mesh, [a_placement], run_check=False)
            B_GoR = DTensor.from_local(B_GoR, tp_mesh, [b_placement], run_check=False)
        fast.setdefault(linear.layer, {})[linear.target] = LowRank(A_GRi, B_GoR, alpha / rank)
    return fast


def keys(seed: int, step: int, sample_ids_B: Tensor, per_sample: bool) -> Tensor:
    """Keys of the draw, `[G]`: one per sequence, or the first sequence's for the whole micro-batch."""
    return keyed_random.key(seed, Stream.FAST_WEIGHTS, step, sample_ids_B if per_sample else sample_ids_B[:1])


def low_rank_term(x_BLi: Tensor, fast: LowRank) -> Tensor:
    """(alpha / R) B (A x), `[B, L, out]` in the layout of the linear's own output.

    Under tensor parallelism the input is what the linear gets (replicated if column-wise, sharded on
    `in` if row-wise) and the output what it returns (sharded on `out`, or on the sequence), as a
    local tensor. For a row-wise linear only the rank-R intermediate is reduced over the group.
    """
    A_GRi, B_GoR, scale = fast
    if not isinstance(A_GRi, DTensor):
        return scale * _project(_project(x_BLi, A_GRi), B_GoR)
    row_wise = A_GRi.placements[0].is_shard()
    if not isinstance(x_BLi, DTensor):
        layout: Placement = Shard(x_BLi.ndim - 1) if row_wise else Replicate()
        x_BLi = DTensor.from_local(x_BLi, A_GRi.device_mesh, [layout], run_check=False)
    z_BLR = cast(DTensor, _project(x_BLi, A_GRi))
    if row_wise:
        z_BLR = z_BLR.redistribute(placements=[Shard(1)])
    term_BLo = cast(DTensor, scale * _project(z_BLR, B_GoR))
    return term_BLo.redistribute(placements=[Shard(1) if row_wise else Shard(2)]).to_local()


def _project(x_BLi: Tensor, weight_Goi: Tensor) -> Tensor:
    if weight_Goi.shape[0] == 1:
        return F.linear(x_BLi, weight_Goi.squeeze(0))
    return torch.bmm(x_BLi, weight_Goi.transpose(1, 2))


def leaves(fast: FastWeights) -> list[Tensor]:
    """All tensors of the tree in a fixed order."""
    return [tensor for layer in fast.values() for pair in layer.values() for tensor in (pair.A_GRi, pair.B_GoR)]


def map_leaves(function: Callable[..., Tensor], fast: FastWeights, *others: Sequence[Tensor]) -> FastWeights:
    """The tree with `function(leaf, *corresponding entries of others)` in place of every leaf."""
    rows = zip(leaves(fast), *others, strict=True)
    new = iter([function(*row) for row in rows])
    return {
        layer: {target: LowRank(next(new), next(new), pair.scale) for target, pair in targets.items()}
        for layer, targets in fast.items()
    }


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared 2-norm of every set of every tensor, `[T, G]`, plain and equal on all ranks.

    DTensors must be replicated or sharded, not partial. All sharded ones are reduced in one collective.
    """

    def local(x: Tensor) -> Tensor:
        x = x.to_local() if isinstance(x, DTensor) else x
        return x.float().square().sum((1, 2))

    norms_TG = torch.stack([local(x) for x in tensors])
    sharded = [i for i, x in enumerate(tensors) if isinstance(x, DTensor) and x.placements[0].is_shard()]
    if sharded:
        mesh = tensors[sharded[0]].device_mesh  # type: ignore[attr-defined]
        part = DTensor.from_local(norms_TG[sharded], mesh, [Partial()], run_check=False)
        norms_TG[sharded] = part.full_tensor()
    return norms_TG


def sgd_update(
    fast: FastWeights, grads: Sequence[Tensor], learning_rate: float, clip: float, keep_G: Tensor
) -> tuple[FastWeights, Tensor]:
    """One SGD step, every set's every tensor clipped by its own norm: g *= clip / (norm + 1e-12) above it.

    Args:
        grads: gradients of `leaves(fast)`.
        clip: largest norm; 0 switches clipping off.
        keep_G: bool; sets where it is False are left as they are, and so are those whose gradient is
            not finite.

    Returns:
        The new fast weights, and the 2-norm `[G]` of each set's whole gradient before clipping.
    """
    # Under tensor parallelism the gradient of a replicated tensor arrives as a partial sum.
    grads = [
        g.redistribute(placements=x.placements) if isinstance(x, DTensor) and isinstance(g, DTensor) else g
        for x, g in zip(leaves(fast), grads, strict=True)
    ]
    squares_TG = squared_norms(grads)
    norms_TG = squares_TG.sqrt()
    keep_G = keep_G & norms_TG.isfinite().all(0)
    factor_TG = torch.where(norms_TG > clip, clip / (norms_TG + 1e-12), 1.0) if clip > 0 else torch.ones_like(norms_TG)

    def step(x: Tensor, g: Tensor, factor_G: Tensor) -> Tensor:
        # Local arithmetic: the factor is one number per set, the same on every tensor-parallel rank.
        placements = (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
        x, g = (y.to_local() if isinstance(y, DTensor) else y for y in (x, g))
        moved = x - learning_rate * factor_G[:, None, None] * g
        new = torch.where(keep_G[:, None, None], moved, x)
        return DTensor.from_local(new, *placements, run_check=False) if placements else new

    return map_leaves(step, fast, grads, list(factor_TG)), squares_TG.sum(0).sqrt()
