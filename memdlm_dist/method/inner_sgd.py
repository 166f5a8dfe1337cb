"""Optimiser of the inner loop: SGD with per-set gradient clipping, also for sets that several ranks share.

Shapes: G sets of fast weights, E local experts, n matrices of a fast tensor: G, or E G in a mixture of experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce, get_rank
from torch.distributed.tensor import DTensor, Partial

from memdlm_dist.method.fast_weight_tree import leaves, map_leaves
from memdlm_dist.method.fast_weights import FastLinear, FastWeights, Full, LowRank


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
    """Ranks that share sets of fast weights, or the experts' terms of them.

    "rows": a context-parallel group. Each rank holds other tokens of the same rows, and all terms of their sets.
    Gradients add up over the group.

    "sets": an expert-parallel group whose ranks hold other rows and share one set. Each rank stores the terms of its
    local experts. The experts' all-to-all has brought the gradients of all tokens to these terms. Squared norms add up
    over the group. Each rank stores all terms of the other linears; their gradients add up over the group.

    "experts": an expert-parallel group whose ranks hold other rows and G sets of their own. Each rank stores its local
    experts' terms of the sets of all ranks, ordered by rank, and the other linears' terms of its own sets. Only
    squared norms add up over the group.
    """

    process_group: ProcessGroup
    shares: Literal["rows", "sets", "experts"]
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

    def losses(self, loss_G: Tensor) -> Tensor:
        """Return the losses of this rank's sets, over the tokens of all ranks."""
        return loss_G if self.shares == "experts" else self.sum(loss_G)

    def counts(self, count_G: Tensor) -> Tensor:
        """Return the scored tokens of this rank's sets, on all ranks; the ranks may hold the same rows."""
        return self.sum(count_G) if self.shares == "sets" else count_G

    def own_sets(self, value_A: Tensor, n_sets: int) -> Tensor:
        """Return the entries of this rank's G = `n_sets` sets, `[G]`, from a result of `set_totals`."""
        return value_A if self.shares != "experts" else value_A.narrow(0, get_rank(self.process_group) * n_sets, n_sets)

    def gradients(self, fast: FastWeights, grads: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the sum of all ranks' losses.

        Args:
            grads: gradients of `leaves(fast)`; DTensors must not be partial.
        """
        if self.shares == "experts":
            return list(grads)
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
    fast: FastWeights,
    squares: Sequence[Tensor],
    n_sets: int,
    group: FastWeightGroup | None = None,
    marks_G: Tensor | None = None,
) -> Tensor:
    """Compute the squared 2-norm of every set, over all its tensors and experts, `[A]`.

    A is the number of sets whose terms this rank stores: G, or those of all ranks of the group "experts".

    Args:
        fast: sets of fast weights.
        squares: `squared_norms` of tensors like `leaves(fast)`.
        n_sets: G.
        group: ranks that share the sets.
        marks_G: added to the results of this rank's sets.
    """
    is_local = group.is_local(fast) if group is not None else [False] * len(squares)
    local, others = ([x for x, y in zip(squares, is_local, strict=True) if y == kind] for kind in (True, False))
    own_G = torch.stack([x.view(-1, n_sets).sum(0) for x in others]).sum(0) if others else None
    if marks_G is not None:
        own_G = marks_G if own_G is None else own_G + marks_G
    if not local:
        assert own_G is not None
        return own_G
    assert group is not None
    n_all = n_sets * (group.process_group.size() if group.shares == "experts" else 1)
    experts_A = torch.stack([x.view(-1, n_all).sum(0) for x in local]).sum(0)
    if group.shares == "experts" and own_G is not None:
        group.own_sets(experts_A, n_sets).add_(own_G)  # the other ranks add nothing to these entries
        own_G = None
    total_A = group.sum(experts_A)
    return total_A if own_G is None else total_A + own_G


def _repeat_for_experts(value_G: Tensor, like_n: Tensor) -> Tensor:
    """Repeat a per-set value `[G]` for every expert, to the length n of `like_n`."""
    return value_G.repeat(len(like_n) // len(value_G))


# (a tensor's squared norms `[n]`, squared norms of the sets `[G]`) -> squared norms `[n]` that decide on clipping.
GRADIENT_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "per_parameter": lambda square_n, set_G: square_n,
    "global": lambda square_n, set_G: _repeat_for_experts(set_G, square_n),
}


# Width of the backbones in MemDLM's experiments, LLaDA-MoE and LLaDA2.1-mini.
REFERENCE_WIDTH = 2048
# Powers of the backbone's width, for each tensor of a fast-weight type. If the learning rates are proportional to them,
# clipped steps change the linears' outputs by the same share at every width: |W x| and |x| grow as sqrt(width), |A x|
# does not. So B must change in proportion to sqrt(width), A in inverse proportion to it, and delta by the same norm.
WIDTH_EXPONENTS: dict[type[FastLinear], tuple[float, ...]] = {LowRank: (-0.5, 0.5), Full: (0.0,)}
# (width of the backbone, a tensor's entry of `WIDTH_EXPONENTS`) -> factor of the tensor's learning rate.
LEARNING_RATE_SCALES: dict[str, Callable[[int, float], float]] = {
    "none": lambda width, exponent: 1.0,
    "width": lambda width, exponent: (width / REFERENCE_WIDTH) ** exponent,
}


@dataclass(frozen=True)
class InnerSGD:
    """Settings of the inner loop's SGD."""

    learning_rate: float = 0.1
    clip: float = 1.0  # maximum gradient norm; 0 disables clipping
    gradient_norm: str = "per_parameter"  # a key of `GRADIENT_NORMS`
    learning_rate_scale: str = "width"  # a key of `LEARNING_RATE_SCALES`
    width: int = REFERENCE_WIDTH  # of the backbone

    def learning_rates(self, fast: FastWeights) -> list[float]:
        """Return the learning rates of the tensors in `leaves(fast)`."""
        scale = LEARNING_RATE_SCALES[self.learning_rate_scale]
        return [
            self.learning_rate * scale(self.width, exponent)
            for linears in fast.values()
            for linear in linears.values()
            for exponent in WIDTH_EXPONENTS[type(linear)]
        ]


def sgd_update(
    fast: FastWeights,
    grads: Sequence[Tensor],
    optimiser: InnerSGD,
    update_G: Tensor,
    group: FastWeightGroup | None = None,
) -> tuple[FastWeights, Tensor]:
    """Take one clipped SGD step: phi -= lr * g * clip / (norm + 1e-12) where norm > clip, else phi -= lr * g.

    `lr` is a tensor's learning rate, see `InnerSGD.learning_rates`.

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
    n_sets, marks_G, in_experts = len(update_G), None, [False] * len(squares)
    if group is not None and group.shares == "experts":
        # NaN tells the other ranks which sets not to update.
        marks_G, in_experts = torch.where(update_G, 0.0, torch.nan), group.is_local(fast)
    total_A = set_totals(fast, squares, n_sets, group, marks_G)
    total_G = total_A if group is None else group.own_sets(total_A, n_sets)
    update_G = update_G & total_G.isfinite()
    clip = optimiser.clip

    def step(x: Tensor, g: Tensor, square_n: Tensor, in_experts: bool, learning_rate: float) -> Tensor:
        total, update = (total_A, total_A.isfinite()) if in_experts else (total_G, update_G)
        norm_n = GRADIENT_NORMS[optimiser.gradient_norm](square_n, total).sqrt()
        factor_n = torch.where(norm_n > clip, clip / (norm_n + 1e-12), 1.0) if clip > 0 else torch.ones_like(norm_n)
        update_n = _repeat_for_experts(update, factor_n)
        # Compute on local tensors: the factor is one number per matrix, equal on every tensor-parallel rank.
        placements = (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
        x, g = (y.to_local() if isinstance(y, DTensor) else y for y in (x, g))
        updated = x - learning_rate * factor_n[:, None, None] * g
        new = torch.where(update_n[:, None, None], updated, x)
        return DTensor.from_local(new, *placements, run_check=False) if placements else new

    return map_leaves(step, fast, grads, squares, in_experts, optimiser.learning_rates(fast)), total_G.sqrt()
