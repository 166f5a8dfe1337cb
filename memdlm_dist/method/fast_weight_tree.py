"""Operations on all tensors of a tree of fast weights: list, map, measure, select and replace sets.

Shapes: G sets of fast weights.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.method.fast_weights import AdaptedLinear, FastLinear, FastWeights, WriteNorms


def leaves(fast: FastWeights) -> list[Tensor]:
    """Return all tensors of the tree, in a fixed order."""
    return [x for layer in fast.values() for linear in layer.values() for x in linear if isinstance(x, Tensor)]


def map_leaves(function: Callable[..., Tensor], fast: FastWeights, *others: Sequence[Any]) -> FastWeights:
    """Build a tree with `function(leaf, *entries)` in place of every leaf.

    Args:
        others: sequences in the order of `leaves`; each gives one entry per leaf.
    """
    rows = zip(leaves(fast), *others, strict=True)
    new = iter([function(*row) for row in rows])

    def rebuild(linear: FastLinear) -> FastLinear:
        values: Any = [next(new) if isinstance(x, Tensor) else x for x in linear]
        return type(linear)(*values)

    return {layer: {target: rebuild(linear) for target, linear in targets.items()} for layer, targets in fast.items()}


def measuring(fast: FastWeights, linears: Iterable[AdaptedLinear]) -> tuple[FastWeights, list[Tensor]]:
    """Return fast weights that add up `WriteNorms`, and these norms by linear, `[2]` each, float32.

    The norms of experts' row-wise linears stay 0: under tensor parallelism their outputs are partial sums, whose norm
    would say nothing, and a scalar must have the same meaning on every layout.
    """
    unmeasured = {(linear.layer, linear.target) for linear in linears if linear.experts and linear.row_wise}
    measured: FastWeights = {}
    squares: list[Tensor] = []
    for layer, targets in fast.items():
        measured[layer] = {}
        for target, linear in targets.items():
            # A tensor for each linear: compiled blocks would treat views of one tensor as aliases.
            norms = WriteNorms(linear[0].device)
            squares.append(norms.squares_2)
            measured[layer][target] = linear._replace(norms=None if (layer, target) in unmeasured else norms)
    return measured, squares


def select(fast: FastWeights, index_B: Sequence[int] | Tensor, n_sets: int) -> FastWeights:
    """Select sets of fast weights by number.

    Args:
        index_B: numbers of the sets, in any order; repeats are allowed. A tensor must be on the sets' device.
        n_sets: G, the number of sets in `fast`.
    """
    index = index_B if isinstance(index_B, Tensor) else list(index_B)

    def select_sets(x: Tensor) -> Tensor:
        local = x.to_local() if isinstance(x, DTensor) else x
        chosen = local.unflatten(0, (-1, n_sets))[:, index].flatten(0, 1)
        if not isinstance(x, DTensor):
            return chosen
        return DTensor.from_local(chosen, x.device_mesh, x.placements, run_check=False)

    return map_leaves(select_sets, fast)


@torch.no_grad()
def replace_sets(fast: FastWeights, index_B: Sequence[int] | Tensor, n_sets: int, new: FastWeights) -> None:
    """Replace sets of fast weights in place.

    Args:
        index_B: numbers of the sets to replace, without repeats, in the order of `new`'s sets. A tensor must be on the
            sets' device.
        n_sets: G, the number of sets in `fast`.
        new: len(index_B) sets, sharded like `fast`.
    """
    for x, y in zip(leaves(fast), leaves(new), strict=True):
        local, values = (z.to_local() if isinstance(z, DTensor) else z for z in (x, y))
        sets, values = local.unflatten(0, (-1, n_sets)), values.unflatten(0, (-1, len(index_B)))
        index = index_B if isinstance(index_B, Tensor) else torch.tensor(list(index_B), device=sets.device)
        sets.index_copy_(1, index, values)
