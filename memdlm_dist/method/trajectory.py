"""The simulated denoising trajectory of a micro-batch: the anchor and the inner states, as masks; on the host.

A sample is a row, or a document of a packed row (documents.py): it has a noise level and ratios of its own.

Shapes: B rows, L tokens, U samples (B of them, but for packed rows), K inner steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.method import keyed_random
from memdlm_dist.method.diffusion import level_from_uniform, noise_at
from memdlm_dist.method.documents import Documents, broadcast_to_tokens, count_per_sample
from memdlm_dist.method.keyed_random import Stream

IGNORE_INDEX = -100

# Mask ratios between which the `progressive` trajectory runs, whatever the anchor's.
PROGRESSIVE_RATIOS = (0.8, 0.2)


class Draw(NamedTuple):
    """What is random about a micro-batch's masks, and what may be masked."""

    maskable_BL: Tensor  # bool
    t_U: Tensor  # float64: noise level of the outer loss
    u_BL: Tensor  # float64, uniform on [0, 1): behind the anchor and the states nested around it
    v_BL: Tensor  # the same, independent of u: behind states that are independent of the anchor
    documents: Documents | None = None  # where these are the samples, and not the rows

    def count_per_sample(self, chosen_BL: Tensor) -> Tensor:
        """Number of chosen tokens of every sample, int64 `[U]`."""
        return count_per_sample(chosen_BL, self.documents)

    def broadcast(self, value_U: Tensor) -> Tensor:
        """What holds of each sample, as it is to be combined with its tokens: `[B, L]` or `[B, 1]`."""
        return broadcast_to_tokens(value_U, self.documents)

    def smallest(self, u_BL: Tensor, count_U: Tensor) -> Tensor:
        """Mask of every sample's `count_U` maskable tokens with the smallest u."""
        return smallest(u_BL, self.maskable_BL, count_U, self.documents)


# The input that the outer loss reads: number 0 of a micro-batch's inputs.
ANCHOR_INPUT = 0


@dataclass(frozen=True)
class State:
    """One point of a trajectory, as masks.

    States with the same mask name the same input, so that one pass of the trunk serves them. Which do follows from
    the trajectory alone, never from the values of the masks: ranks would differ in their passes and collectives.
    """

    mask_BL: Tensor  # bool: shown to the model as [MASK]
    target_BL: Tensor  # bool: scored, a subset of the mask
    weight_U: Tensor  # float32: loss weight of the sample's tokens
    next_BL: Tensor | None = None  # mask of the state that follows; None: the clean sequence does
    reads: int = ANCHOR_INPUT  # number of the input with this mask
    next_reads: int | None = None  # and with the following state's; None: the clean sequence


@dataclass(frozen=True)
class Plan:
    """Which states the inner loop visits, and what is scored there."""

    trajectory: str = "anchor_consistent"
    inner_steps: int = 2  # K
    pre_anchor_scale: float = 1.5  # s
    supervision: str = "masked"
    schedule: str = "linear"
    loss_weight: str = "schedule"

    def states(self, draw: Draw, anchor: State) -> list[State]:
        """The states of the inner loop in the order of its steps."""
        supervise = SUPERVISION[self.supervision]
        states = TRAJECTORIES[self.trajectory](draw, anchor, self)
        return [replace(state, target_BL=supervise(state)) for state in states]

    def weight(self, level_U: Tensor) -> Tensor:
        """Loss weight of tokens at a noise level, float32 `[B]`."""
        return noise_at(level_U, self.schedule, self.loss_weight).weight.float()


def draw(
    seed: int,
    step: int,
    sample_ids_U: Tensor,
    maskable_BL: Tensor,
    t_U: Tensor | None = None,
    documents: Documents | None = None,
) -> Draw:
    """The keyed draw of a micro-batch: one noise level a sample, and uniform numbers for every token.

    Args:
        seed: the run's seed.
        step: training step; 0 for noise that stays fixed.
        sample_ids_U: int64, global sample ids.
        maskable_BL: bool, True where a token may be masked.
        t_U: noise levels to take instead of drawn ones.
        documents: of packed rows. A document draws what it would draw in a row of its own.
    """

    def of_tokens(stream: Stream) -> Tensor:
        key_U = keyed_random.key(seed, stream, step, sample_ids_U)
        if documents is None:
            return keyed_random.uniform(key_U, torch.arange(maskable_BL.shape[1]))
        return keyed_random.uniform(documents.broadcast(key_U), documents.position_BL.unsqueeze(-1)).squeeze(-1)

    if t_U is None:
        u_U1 = keyed_random.uniform(keyed_random.key(seed, Stream.LEVEL, step, sample_ids_U), torch.arange(1))
        t_U = level_from_uniform(u_U1.squeeze(-1))
    return Draw(maskable_BL, t_U, of_tokens(Stream.MASK), of_tokens(Stream.INNER_MASK), documents)


def anchor_state(draw: Draw, schedule: str, weight: str) -> State:
    """The outer loss's corruption: maskable tokens with u below the mask probability at t."""
    noise = noise_at(draw.t_U, schedule, weight)
    mask_BL = draw.maskable_BL & (draw.u_BL < draw.broadcast(noise.mask_probability))
    return State(mask_BL, mask_BL, noise.weight.float())


def prompt_anchor(draw: Draw, ratio: float) -> State:
    """The anchor of a prompt that is to be remembered: int(n * ratio) of its n maskable tokens, at least one."""
    n_U = draw.count_per_sample(draw.maskable_BL)
    count_U = torch.maximum((n_U.double() * ratio).long(), n_U.clamp(max=1))
    mask_BL = draw.smallest(draw.u_BL, count_U)
    return State(mask_BL, mask_BL, torch.ones_like(draw.t_U, dtype=torch.float32))


def _anchor_consistent(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """K states from the pre-anchor down to the anchor, nested by construction.

    The pre-anchor masks int(n * r_pre) of the n maskable tokens, r_pre = min(1, s r), and at least the
    anchor's own, where r is the realised mask ratio; each further state reveals ceil(left / steps left)
    of the extra ones; the last state is the anchor. With K = 1 the pre-anchor is all there is, as in the
    published code. A state masks the tokens with the smallest u; its weight is w at its realised ratio.
    """
    n_U = draw.count_per_sample(draw.maskable_BL)
    floor_U = draw.count_per_sample(anchor.mask_BL)
    # The published code computes r and s r in float32 and truncates the product with n in double:
    # 6 of 28 with s = 1.5 gives 8, not 9. We reproduce its counts exactly.
    ratio_U = floor_U.float() / n_U.clamp(min=1).float()
    pre_ratio_U = (ratio_U * plan.pre_anchor_scale).clamp(max=1)
    count_U = torch.maximum((n_U.double() * pre_ratio_U.double()).long(), floor_U)

    masks, weights = [], []
    for left in range(plan.inner_steps - 1, -1, -1):
        realised_U = (count_U.float() / n_U.clamp(min=1).float()).double()
        # A sample with nothing masked has no scored token, so its weight is never read; keep it finite.
        weights.append(plan.weight(torch.where(count_U > 0, realised_U, 1.0)))
        # The last state is the anchor and shares its trunk pass.
        is_anchor = left == 0 and plan.inner_steps > 1
        masks.append(anchor.mask_BL if is_anchor else draw.smallest(draw.u_BL, count_U))
        if left:
            count_U = count_U - (count_U - floor_U + left - 1) // left
    return _chain(masks, weights, ends_at_anchor=plan.inner_steps > 1)


def _pre_anchor_only(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """The first of the two default states; what follows it is still the anchor."""
    return _anchor_consistent(draw, anchor, replace(plan, inner_steps=2))[:1]


def _anchor_only(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """The anchor alone, weighed as in the outer loss: by the sampled t, not by the realised ratio."""
    return [replace(anchor, weight_U=plan.weight(draw.t_U))]


def _progressive(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """K states with ratios of their own, from 0.8 to 0.2, whatever the anchor: the paper's "inconsistent" one.

    The first masks each maskable token with probability 0.8, each further one int(n * ratio) of those
    still masked; K = 1 is a state at 0.2. A sample's weight is w at the ratio, not at the realised one.
    """
    first, last = PROGRESSIVE_RATIOS
    # In this order of operations, which makes the last of several 0.2 - 4e-17: 30 tokens leave 5.
    steps = plan.inner_steps
    ratios = [first + (last - first) * (k / (steps - 1)) for k in range(steps)] if steps > 1 else [last]
    n_U = draw.count_per_sample(draw.maskable_BL)
    count_U = draw.count_per_sample(draw.maskable_BL & (draw.v_BL < ratios[0]))
    masks = []
    for k, ratio in enumerate(ratios):
        if k:
            count_U = torch.minimum(count_U, (n_U.double() * ratio).long())
        masks.append(draw.smallest(draw.v_BL, count_U))
    return _chain(masks, [plan.weight(torch.full_like(draw.t_U, ratio)) for ratio in ratios])


TRAJECTORIES: dict[str, Callable[[Draw, State, Plan], list[State]]] = {
    "anchor_consistent": _anchor_consistent,
    "pre_anchor_only": _pre_anchor_only,
    "anchor_only": _anchor_only,
    "progressive": _progressive,
}
# Trajectories of one state, which take one inner step whatever K.
SINGLE_STATE = ("pre_anchor_only", "anchor_only")

# Which of a state's masked tokens are scored. Before the clean sequence the two are the same.
SUPERVISION: dict[str, Callable[[State], Tensor]] = {
    "masked": lambda state: state.mask_BL,
    "newly_revealed": lambda state: state.mask_BL if state.next_BL is None else state.mask_BL & ~state.next_BL,
}


def smallest(u_BL: Tensor, maskable_BL: Tensor, count_U: Tensor, documents: Documents | None = None) -> Tensor:
    """Mask of every sample's `count_U` maskable tokens with the smallest u."""
    u_BL = torch.where(maskable_BL, u_BL, 2.0)
    rank_BL = u_BL.argsort(1).argsort(1) if documents is None else documents.rank_within_sample(u_BL)
    return maskable_BL & (rank_BL < broadcast_to_tokens(count_U, documents))


def _chain(masks: Sequence[Tensor], weights: Sequence[Tensor], ends_at_anchor: bool = False) -> list[State]:
    """Return the states of these masks, each followed by the next and the last by the clean sequence."""
    reads = list(range(ANCHOR_INPUT + 1, ANCHOR_INPUT + 1 + len(masks)))
    if ends_at_anchor:
        reads[-1] = ANCHOR_INPUT
    following = zip([*masks[1:], None], [*reads[1:], None], strict=True)
    return [
        State(mask, mask, weight, next_mask, number, next_number)
        for mask, weight, number, (next_mask, next_number) in zip(masks, weights, reads, following, strict=True)
    ]
