"""Inner loop: K steps of SGD on the fast weights along a trajectory.

`adapt` is a pure function of its arguments.

Shapes: G sets of fast weights, N scored tokens, K inner steps (of all epochs), X adapted linears.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memdlm_dist.method import fast_weight_tree, inner_sgd
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_sgd import FastWeightGroup, InnerSGD
from memdlm_dist.method.micro_batch import Scored
from memdlm_dist.method.sets import Sets


@dataclass(frozen=True)
class InnerStatistics:
    """Statistics of the inner loop per step and set, for metrics."""

    loss_KG: Tensor  # before the step's update
    grad_norm_KG: Tensor  # 2-norm over all tensors of the set, before clipping
    counted_KG: Tensor  # bool: the set has a scored token, and its loss and gradient are finite
    skipped_KG: Tensor  # bool: loss or gradient is not finite, so the set is not updated
    written_norm_G: Tensor  # 2-norm of the set's total change
    # Measured by `bilevel.outer_loss`; this rank's share of the sums.
    write_X2: Tensor | None = None  # squared norms of a linear's fast-weight term and of its own output
    anchor_nll: Mapping[str, Tensor] = field(default_factory=dict)  # pass -> [sum of -log p, number of tokens]

    @classmethod
    def empty(cls, steps: int, device: torch.device) -> "InnerStatistics":
        """Return the statistics of K = `steps` inner steps without any set."""
        zeros_KG, false_KG = (torch.zeros(steps, 0, dtype=d, device=device) for d in (torch.float32, torch.bool))
        return cls(zeros_KG, zeros_KG, false_KG, false_KG, torch.zeros(0, device=device))


def adapt(
    state_loss: Callable[[int, FastWeights, SetSum], Tensor],
    scored: Sequence[Scored],
    fast: FastWeights,
    sets: Sets,
    optimiser: InnerSGD,
    group: FastWeightGroup | None = None,
) -> tuple[FastWeights, InnerStatistics]:
    """Adapt the fast weights to K states of a trajectory, with one first-order SGD step per state.

    phi_{k+1} = phi_k - lr * clip(d L_k / d phi_k), for each set of fast weights, with
    L_k = sum over the set's scored tokens of (weight * token loss) / (number of the set's scored tokens).
    The outer loss is divided by the number of labelled tokens of the global batch instead.

    Sets are independent of each other: one backward pass through the sum of their losses gives each set its own
    gradient. A set whose loss or gradient is not finite is not updated at that state; the trajectory still advances.

    Args:
        state_loss: (k, fast weights, sums) -> losses `[G]` of state k; `sums` adds up the token losses of each set.
        scored: scored tokens of the K states, in the order of the steps; several epochs repeat the trajectory's states.
        fast: initial fast weights; not modified.
        sets: assignment of the samples to the G sets.
        optimiser: clipped SGD.
        group: ranks that share the sets, or their experts' terms. Losses, gradients and squared norms cover the tokens
            of all ranks.

    Returns:
        The fast weights after the last step, detached, and the statistics.
    """
    initial = fast
    losses, norms, counted, skipped = [], [], [], []
    with torch.enable_grad():
        for k, tokens in enumerate(scored):
            fast = fast_weight_tree.map_leaves(lambda x: x.detach().requires_grad_(), fast)
            sums, count_G = _set_means(tokens, sets, fast_weight_tree.leaves(fast)[0].dtype, group)
            loss_G = state_loss(k, fast, sums)
            grads = torch.autograd.grad(loss_G.sum(), fast_weight_tree.leaves(fast))
            with torch.no_grad():
                loss_G = loss_G.detach() if group is None else group.losses(loss_G.detach())
                fast, norm_G = inner_sgd.sgd_update(fast, grads, optimiser, loss_G.isfinite(), group)
            finite_G = loss_G.isfinite() & norm_G.isfinite()
            losses.append(loss_G)
            norms.append(norm_G)
            counted.append(finite_G & (count_G > 0))
            skipped.append(~finite_G)
    with torch.no_grad():
        change = [new - old for new, old in zip(*map(fast_weight_tree.leaves, (fast, initial)), strict=True)]
        written = inner_sgd.set_totals(fast, inner_sgd.squared_norms(change), sets.count, group).sqrt()
    statistics = InnerStatistics(
        torch.stack(losses),
        torch.stack(norms),
        torch.stack(counted),
        torch.stack(skipped),
        written if group is None else group.own_sets(written, sets.count),
    )
    return fast, statistics


def _set_means(tokens: Scored, sets: Sets, dtype: torch.dtype, group: FastWeightGroup | None) -> tuple[SetSum, Tensor]:
    """Build the sum that gives each set's mean weighted token loss; also return the sets' token counts `[G]`."""
    set_U = sets.of_samples(tokens.count_U.device)
    set_N = set_U[tokens.sample_N]
    count_G = torch.zeros_like(tokens.count_U[: sets.count]).index_add(0, set_U, tokens.count_U)
    if group is not None:
        count_G = group.counts(count_G)
    coefficient_N = tokens.valid_N.to(dtype) * tokens.weight_N / count_G.clamp(min=1)[set_N]
    return SetSum(coefficient_N, set_N, sets.count), count_G
