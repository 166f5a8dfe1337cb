"""The optimiser of the inner loop: SGD on fast weights, each set's gradient clipped; over the ranks that share sets.

Shapes: G sets of fast weights, E experts of this rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor, Partial

from memdlm_dist.method.fast_weights import FastWeights, leaves, map_leaves


def squared_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Squared 2-norm of every set of every tensor, and of every expert, `[G]` or `[E G]` each, plain and equal on
    all tensor-parallel ranks.

    DTensors must be replicated or sharded, not partial. All sharded ones are reduced in one collective.
    """

    def local(x: Tensor) -> Tensor:
        x = x.to_local() if isinstance(x, DTensor) else x
        return x.float().square().sum((1, 2))

    squares = [local(x) for x in tensors]
    sharded = [i for i, x in enumerate(tensors) if isinstance(x, DTensor) and x.placements[0].is_shard()]
    if sharded:
        mesh = tensors[sharded[0]].device_mesh  # type: ignore[attr-defined]
        part = DTensor.from_local(torch.cat([squares[i] for i in sharded]), mesh, [Partial()], run_check=False)
        whole = part.full_tensor().split([len(squares[i]) for i in sharded])
        for i, reduced in zip(sharded, whole, strict=True):
            squares[i] = reduced
    return squares


@dataclass(frozen=True)
class FastWeightGroup:
    """Ranks that have their sets of fast weights together.

    Those of a context-parallel group have other tokens of the same rows each, and the whole sets: their
    gradients add up. Those of an expert-parallel group have other rows each and share one set, of which
    they keep their own experts' terms: these get the gradients of all tokens, and their norms add up.
    """

    process_group: ProcessGroup
    whole_sets: bool

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks."""
        x = x.clone()
        all_reduce(x, group=self.process_group)
        return x

    def gradients(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the sum of all ranks' losses; DTensors must not be partial."""
        if not self.whole_sets:
            return list(grads)
        grads = [g.clone(memory_format=torch.contiguous_format) for g in grads]
        works = [
            all_reduce(g.to_local() if isinstance(g, DTensor) else g, group=self.process_group, async_op=True)
            for g in grads
        ]
        for work in works:
            work.wait()
        return grads


def set_totals(squares: Sequence[Tensor], n_sets: int, group: FastWeightGroup | None = None) -> Tensor:
    """Squared 2-norm of every set `[G]`, all its tensors and experts together.

    Args:
        squares: from `squared_norms`.
        n_sets: G.
        pool: the ranks that have the sets together.
    """
    total_G = torch.stack([x.view(-1, n_sets).sum(0) for x in squares]).sum(0)
    return total_G if group is None or group.whole_sets else group.sum(total_G)


def _of_experts(value_G: Tensor, like_n: Tensor) -> Tensor:
    """What holds of each set, for every expert's entry of it."""
    return value_G.repeat(len(like_n) // len(value_G))


# What a tensor's clipping goes by, of squared norms: its own `[n]`, or that of all the set's tensors together `[G]`.
GRADIENT_NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "per_parameter": lambda own_n, set_G: own_n,
    "global": lambda own_n, set_G: _of_experts(set_G, own_n),
}


@dataclass(frozen=True)
class InnerSGD:
    """The optimiser of the inner loop."""

    learning_rate: float = 0.1
    clip: float = 1.0  # largest norm; 0 switches clipping off
    gradient_norm: str = "per_parameter"  # a key of `GRADIENT_NORMS`


def sgd_update(
    fast: FastWeights,
    grads: Sequence[Tensor],
    optimiser: InnerSGD,
    keep_G: Tensor,
    group: FastWeightGroup | None = None,
) -> tuple[FastWeights, Tensor]:
    """One SGD step, every set's every tensor clipped by its norm: g *= clip / (norm + 1e-12) above it.

    Args:
        grads: gradients of `leaves(fast)`.
        keep_G: bool; sets where it is False are left as they are, and so are those whose gradient is
            not finite.
        pool: the ranks that have the sets together.

    Returns:
        The new fast weights, and the 2-norm `[G]` of each set's whole gradient before clipping.
    """
    # Under tensor parallelism the gradient of a replicated tensor arrives as a partial sum.
    grads = [
        g.redistribute(placements=x.placements) if isinstance(x, DTensor) and isinstance(g, DTensor) else g
        for x, g in zip(leaves(fast), grads, strict=True)
    ]
    grads = group.gradients(grads) if group is not None else grads
    squares = squared_norms(grads)
    total_G = set_totals(squares, len(keep_G), group)
    keep_G = keep_G & total_G.isfinite()
    clip = optimiser.clip

    def step(x: Tensor, g: Tensor, own_n: Tensor) -> Tensor:
        norm_n = GRADIENT_NORMS[optimiser.gradient_norm](own_n, total_G).sqrt()
        factor_n = torch.where(norm_n > clip, clip / (norm_n + 1e-12), 1.0) if clip > 0 else torch.ones_like(norm_n)
        keep_n = _of_experts(keep_G, factor_n)
        # Local arithmetic: the factor is one number per set, the same on every tensor-parallel rank.
        placements = (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
        x, g = (y.to_local() if isinstance(y, DTensor) else y for y in (x, g))
        moved = x - optimiser.learning_rate * factor_n[:, None, None] * g
        new = torch.where(keep_n[:, None, None], moved, x)
        return DTensor.from_local(new, *placements, run_check=False) if placements else new

    return map_leaves(step, fast, grads, squares), total_G.sqrt()
