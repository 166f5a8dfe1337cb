"""Optimiser of the inner loop: SGD with per-set gradient clipping, also for sets that several ranks share.

Shapes: G sets of fast weights, E local experts, n matrices of a fast tensor: G, or E G in a mixture of experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor, Partial

from memdlm_dist.method.fast_weights import FastWeights, leaves, map_leaves


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Compute the squared 2-norm of every matrix of every tensor `[n, ...]`, `[n]` each.

    The results are plain tensors, equal on all tensor-parallel ranks. DTensors must be replicated or sharded, not
    partial. One collective reduces all sharded ones.
    """

    def local(x: Tensor) -> Tensor:
        x = x.to_local() if isinstance(x, DTensor) else x
        return x.float().square().sum((1, 2))

    squares = [local(x) for x in tensors]
    sharded = [i for i, x in enumerate(tensors) if isinstance(x, DTensor) and x.placements[0].is_shard()]
    if sharded:
        mesh = tensors[sharded[0]].device_mesh  # type: ignore[attr-defined]
        partial = DTensor.from_local(torch.cat([squares[i] for i in sharded]), mesh, [Partial()], run_check=False)
        totals = partial.full_tensor().split([len(squares[i]) for i in sharded])
        for i, reduced in zip(sharded, totals, strict=True):
            squares[i] = reduced
    return squares


@dataclass(frozen=True)
class FastWeightGroup:
    """Ranks that share sets of fast weights.

    Context-parallel group: each rank holds other tokens of the same rows, and all terms of their sets. Gradients add up
    over the group.

    Expert-parallel group: each rank holds other rows. All ranks share one set, and each stores the terms of its local
    experts. The experts' all-to-all has brought the gradients of all tokens to these terms. Squared norms add up over
    the group. Each rank stores all terms of the other linears; their gradients add up over the group.
    """

    process_group: ProcessGroup
    shares_rows: bool  # the ranks hold tokens of the same rows
    experts: frozenset[tuple[str, str]] = frozenset()  # (layer, target) of linears with terms of local experts alone

    def is_local(self, fast: FastWeights) -> list[bool]:
        """Return for every tensor in `leaves(fast)` whether it holds terms of local experts alone."""
        return [
            (layer, target) in self.experts
            for layer, linears in fast.items()
            for target, linear in linears.items()
            for x in linear
            if isinstance(x, Tensor)
        ]

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce a copy of `x` over the group."""
        x = x.clone()
        all_reduce(x, group=self.process_group)
        return x

    def gradients(self, fast: FastWeights, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the sum of all ranks' losses.

        Args:
            grads: gradients of `leaves(fast)`; DTensors must not be partial.
        """
        totals, works = [], []
        for g, is_local in zip(grads, self.is_local(fast), strict=True):
            if not is_local:
                g = g.clone(memory_format=torch.contiguous_format)
                local = g.to_local() if isinstance(g, DTensor) else g
                works.append(all_reduce(local, group=self.process_group, async_op=True))
            totals.append(g)
        for work in works:
            work.wait()
        return totals


def set_totals(
    fast: FastWeights, squares: Sequence[Tensor], n_sets: int, group: FastWeightGroup | None = None
) -> Tensor:
    """Compute the squared 2-norm of every set, over all its tensors and experts, `[G]`.

    Args:
        fast: sets of fast weights.
        squares: `squared_norms` of tensors like `leaves(fast)`.
        n_sets: G.
        group: ranks that share the sets.
    """
    is_local = group.is_local(fast) if group is not None else [False] * len(squares)
    local: list[Tensor] = []
    shared: list[Tensor] = []
    for x, belongs_to_experts in zip(squares, is_local, strict=True):
        (local if belongs_to_experts else shared).append(x.view(-1, n_sets).sum(0))
    totals = [torch.stack(shared).sum(0)] if shared else []
    if local:
        assert group is not None
        totals.append(group.sum(torch.stack(local).sum(0)))
    return sum(totals[1:], totals[0])


def _repeat_for_experts(value_G: Tensor, like_n: Tensor) -> Tensor:
    """Repeat a per-set value `[G]` for every expert, to the length n of `like_n`."""
    return value_G.repeat(len(like_n) // len(value_G))


# (a tensor's squared norms `[n]`, squared norms of the sets `[G]`) -> squared norms `[n]` that decide on clipping.
GRADIENT_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "per_parameter": lambda square_n, set_G: square_n,
    "global": lambda square_n, set_G: _repeat_for_experts(set_G, square_n),
}


@dataclass(frozen=True)
class InnerSGD:
    """Settings of the inner loop's SGD."""

    learning_rate: float = 0.1
    clip: float = 1.0  # maximum gradient norm; 0 disables clipping
    gradient_norm: str = "per_parameter"  # a key of `GRADIENT_NORMS`


def sgd_update(
    fast: FastWeights,
    grads: Sequence[Tensor],
    optimiser: InnerSGD,
    update_G: Tensor,
    group: FastWeightGroup | None = None,
) -> tuple[FastWeights, Tensor]:
    """Take one clipped SGD step: phi -= lr * g * clip / (norm + 1e-12) where norm > clip, else phi -= lr * g.

    `norm` is the norm of one tensor's gradient, per set and expert ("per_parameter"), or of the full set ("global").

    Args:
        grads: gradients of `leaves(fast)`.
        update_G: bool; sets with False are not updated. Neither are sets whose gradient is not finite.
        group: ranks that share the sets.

    Returns:
        The new fast weights, and the 2-norm `[G]` of each set's full gradient before clipping.
    """
    # Under tensor parallelism the gradient of a replicated tensor arrives as a partial sum.
    grads = [
        g.redistribute(placements=x.placements) if isinstance(x, DTensor) and isinstance(g, DTensor) else g
        for x, g in zip(leaves(fast), grads, strict=True)
    ]
    grads = group.gradients(fast, grads) if group is not None else grads
    squares = squared_norms(grads)
    total_G = set_totals(fast, squares, len(update_G), group)
    update_G = update_G & total_G.isfinite()
    clip = optimiser.clip

    def step(x: Tensor, g: Tensor, square_n: Tensor) -> Tensor:
        norm_n = GRADIENT_NORMS[optimiser.gradient_norm](square_n, total_G).sqrt()
        factor_n = torch.where(norm_n > clip, clip / (norm_n + 1e-12), 1.0) if clip > 0 else torch.ones_like(norm_n)
        update_n = _repeat_for_experts(update_G, factor_n)
        # Compute on local tensors: the factor is one number per matrix, equal on every tensor-parallel rank.
        placements = (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
        x, g = (y.to_local() if isinstance(y, DTensor) else y for y in (x, g))
        updated = x - optimiser.learning_rate * factor_n[:, None, None] * g
        new = torch.where(update_n[:, None, None], updated, x)
        return DTensor.from_local(new, *placements, run_check=False) if placements else new

    return map_leaves(step, fast, grads, squares), total_G.sqrt()
