"""The inner loop: write a trajectory into fast weights. A pure function of its arguments.

Shapes: G sets of fast weights, N scored tokens, K inner steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm_dist.method import fast_weights, inner_sgd
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_sgd import FastWeightGroup, InnerSGD
from memdlm_dist.method.micro_batch import Scored


@dataclass(frozen=True)
class InnerStatistics:
    """What happened in the inner loop, for the logs; sets without a scored token are not `counted`."""

    loss_KG: Tensor  # before the step's update
    grad_norm_KG: Tensor  # over all fast tensors of the set, before clipping
    counted_KG: Tensor  # bool
    skipped_KG: Tensor  # bool: a non-finite loss or gradient, so no update
    written_norm_G: Tensor  # 2-norm of what the loop added to the set


def adapt(
    state_loss: Callable[[int, FastWeights, SetSum], Tensor],
    scored: Sequence[Scored],
    fast: FastWeights,
    n_sets: int,
    optimiser: InnerSGD,
    group: FastWeightGroup | None = None,
) -> tuple[FastWeights, InnerStatistics]:
    """K steps of SGD on the fast weights, first order, along K states of a trajectory.

    A set's loss at a state is sum w l / (number of its scored tokens): unlike the outer loss, which
    divides by the maskable ones. The sets are independent of each other, so one backward pass through
    the sum of their losses gives every set its own gradient. A set whose loss or gradient is not
    finite skips that update; the trajectory goes on.

    Args:
        state_loss: (k, fast weights, sums) -> `[G]`, the losses of state k's scored tokens, as `sums` adds them up.
        scored: the K states' scored tokens.
        fast: initial fast weights with `n_sets` sets; not modified.
        n_sets: G; 1 pools all samples, otherwise sample g belongs to set g.
        optimiser: of the fast weights.
        pool: ranks that have the sets together, each with other tokens: losses, gradients and norms are theirs all.

    Returns:
        The fast weights after the last step, detached, and the statistics.
    """
    initial = fast
    losses, norms, counted, skipped = [], [], [], []
    with torch.enable_grad():
        for k, tokens in enumerate(scored):
            fast = fast_weights.map_leaves(lambda x: x.detach().requires_grad_(), fast)
            sums, count_G = _set_means(tokens, n_sets, fast_weights.leaves(fast)[0].dtype, group)
            loss_G = state_loss(k, fast, sums)
            grads = torch.autograd.grad(loss_G.sum(), fast_weights.leaves(fast))
            with torch.no_grad():
                loss_G = loss_G.detach() if group is None else group.sum(loss_G.detach())
                fast, norm_G = inner_sgd.sgd_update(fast, grads, optimiser, loss_G.isfinite(), group)
            finite_G = loss_G.isfinite() & norm_G.isfinite()
            losses.append(loss_G)
            norms.append(norm_G)
            counted.append(finite_G & (count_G > 0))
            skipped.append(~finite_G)
    with torch.no_grad():
        change = [new - old for new, old in zip(*map(fast_weights.leaves, (fast, initial)), strict=True)]
        written_G = inner_sgd.set_totals(inner_sgd.squared_norms(change), n_sets, group).sqrt()
    statistics = InnerStatistics(
        torch.stack(losses), torch.stack(norms), torch.stack(counted), torch.stack(skipped), written_G
    )
    return fast, statistics


def _set_means(tokens: Scored, n_sets: int, dtype: torch.dtype, group: FastWeightGroup | None) -> tuple[SetSum, Tensor]:
    """The mean weighted loss of every set's scored tokens, as a sum; and the number `[G]` of these tokens."""
    set_N, count_G = tokens.sample_N, tokens.count_U
    if n_sets == 1:
        set_N, count_G = torch.zeros_like(set_N), count_G.sum(0, keepdim=True)
    if group is not None and not group.whole_sets:
        count_G = group.sum(count_G)  # the others' rows are not known here
    coefficient_N = tokens.valid_N.to(dtype) * tokens.weight_N / count_G.clamp(min=1)[set_N]
    return SetSum(coefficient_N, set_N, n_sets), count_G
