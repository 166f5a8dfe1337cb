"""Simulated denoising trajectory of a micro-batch: the masks of the anchor and of the inner states.

Computed on the host. A sample is a row, or one document of a packed row (documents.py). Each sample has its own noise
level and mask ratios.

Shapes: B rows, L tokens, U samples (U = B unless rows are packed), K inner steps.
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

# First mask ratio of the `progressive` trajectory, and largest value of the last one (`Plan.progressive_end`).
PROGRESSIVE_START = 0.8


class Draw(NamedTuple):
    """Random numbers that determine a micro-batch's masks, and its maskable tokens."""

    maskable_BL: Tensor  # bool
    t_U: Tensor  # float64: noise level of the outer loss
    u_BL: Tensor  # float64, uniform on [0, 1): decides the anchor and the states nested around it
    v_BL: Tensor  # float64, uniform on [0, 1), independent of u: decides states that do not depend on the anchor
    documents: Documents | None = None  # the samples of packed rows; None: each row is a sample

    def count_per_sample(self, chosen_BL: Tensor) -> Tensor:
        """Count the chosen tokens of every sample, int64 `[U]`."""
        return count_per_sample(chosen_BL, self.documents)

    def broadcast(self, value_U: Tensor) -> Tensor:
        """Broadcast a per-sample value to the sample's tokens: `[B, 1]`, or `[B, L]` if rows are packed."""
        return broadcast_to_tokens(value_U, self.documents)

    def rows(self, index_C: Tensor) -> "Draw":
        """Return the draw of some rows."""
        level = self.t_U.view(len(self.maskable_BL), -1)[index_C].flatten()
        documents = self.documents.rows(index_C) if self.documents is not None else None
        return Draw(self.maskable_BL[index_C], level, self.u_BL[index_C], self.v_BL[index_C], documents)

    def smallest(self, u_BL: Tensor, count_U: Tensor) -> Tensor:
        """Return the mask, bool `[B, L]`, of the `count_U` maskable tokens with the smallest u in every sample."""
        return smallest(u_BL, self.maskable_BL, count_U, self.documents)


# Input number of the anchor, which the outer loss reads.
ANCHOR_INPUT = 0


@dataclass(frozen=True)
class State:
    """One state of a trajectory: masked tokens, scored tokens, loss weights, and the state that follows.

    States with the same input number have the same mask, and one trunk pass serves them all. The plan alone
    determines the input numbers, not the values of the masks: otherwise ranks would run different passes and
    collectives.
    """

    mask_BL: Tensor  # bool: tokens that the model reads as [MASK]
    target_BL: Tensor  # bool: scored tokens, a subset of the mask
    weight_U: Tensor  # float32: loss weight of the sample's tokens
    next_BL: Tensor | None = None  # mask of the next state; None: the next state is the clean sequence
    input_number: int = ANCHOR_INPUT  # number of the input with this mask
    next_input_number: int | None = None  # number of the next state's input; None: the clean sequence

    def rows(self, index_C: Tensor) -> "State":
        """Return the state of some rows."""
        weight_U = self.weight_U.view(len(self.mask_BL), -1)[index_C].flatten()
        next_BL = self.next_BL[index_C] if self.next_BL is not None else None
        return replace(
            self,
            mask_BL=self.mask_BL[index_C],
            target_BL=self.target_BL[index_C],
            weight_U=weight_U,
            next_BL=next_BL,
        )


@dataclass(frozen=True)
class Plan:
    """Settings of the trajectory: its states, their scored tokens and their loss weights."""

    trajectory: str = "anchor_consistent"
    inner_steps: int = 2  # K
    pre_anchor_scale: float = 1.5  # s
    progressive_end: float = 0.2  # last mask ratio of `progressive`
    supervision: str = "masked"
    schedule: str = "linear"
    loss_weight: str = "schedule"

    def states(self, draw: Draw, anchor: State) -> list[State]:
        """Return the K states of the inner loop, in the order of its steps."""
        supervise = SUPERVISION[self.supervision]
        states = TRAJECTORIES[self.trajectory](draw, anchor, self)
        return [replace(state, target_BL=supervise(state, anchor)) for state in states]

    def weight(self, level_U: Tensor) -> Tensor:
        """Return the loss weight at a noise level, float32 `[U]`."""
        return noise_at(level_U, self.schedule, self.loss_weight).weight.float()


def draw(
    seed: int,
    step: int | Tensor,
    sample_ids_U: Tensor,
    maskable_BL: Tensor,
    t_U: Tensor | None = None,
    documents: Documents | None = None,
) -> Draw:
    """Draw a noise level for every sample and uniform numbers for every token, keyed by (seed, step, sample id).

    Args:
        seed: seed of the run.
        step: training step, or one number per sample; 0 for noise that is the same in every step.
        sample_ids_U: int64, global sample ids.
        maskable_BL: bool, tokens that may be masked.
        t_U: noise levels to use instead of drawn ones.
        documents: documents of packed rows. A packed document gets the numbers that it would get alone in a row.
    """

    def draw_tokens(stream: Stream) -> Tensor:
        key_U = keyed_random.key(seed, stream, step, sample_ids_U)
        if documents is None:
            return keyed_random.uniform(key_U, torch.arange(maskable_BL.shape[1]))
        return keyed_random.uniform(documents.broadcast(key_U), documents.position_BL.unsqueeze(-1)).squeeze(-1)

    if t_U is None:
        u_U1 = keyed_random.uniform(keyed_random.key(seed, Stream.LEVEL, step, sample_ids_U), torch.arange(1))
        t_U = level_from_uniform(u_U1.squeeze(-1))
    return Draw(maskable_BL, t_U, draw_tokens(Stream.MASK), draw_tokens(Stream.INNER_MASK), documents)


def anchor_state(draw: Draw, schedule: str, weight: str) -> State:
    """Return the anchor x_t, the state of the outer loss: it masks maskable tokens with u below 1 - alpha(t)."""
    noise = noise_at(draw.t_U, schedule, weight)
    mask_BL = draw.maskable_BL & (draw.u_BL < draw.broadcast(noise.mask_probability))
    return State(mask_BL, mask_BL, noise.weight.float())


def prompt_anchor(draw: Draw, ratio: float) -> State:
    """Return the anchor for adapting to prompts: it masks int(n * ratio) of n maskable tokens, and at least one."""
    n_U = draw.count_per_sample(draw.maskable_BL)
    count_U = torch.maximum((n_U.double() * ratio).long(), n_U.clamp(max=1))
    mask_BL = draw.smallest(draw.u_BL, count_U)
    return State(mask_BL, mask_BL, torch.ones_like(draw.t_U, dtype=torch.float32))


def _anchor_consistent(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """Return K nested states, from the pre-anchor to the anchor.

    The pre-anchor masks max(|M_t|, int(n r_pre)) of the n maskable tokens, where M_t are the anchor's masked tokens,
    r = |M_t| / n and r_pre = min(1, s r). Each further state reveals ceil(extra / steps left) tokens, where `extra`
    counts the masked tokens outside M_t. The last state is the anchor. With K = 1 the pre-anchor is the only state,
    as in the published code.

    A state masks the tokens with the smallest u, hence the nesting. Its loss weight is w(its realised mask ratio).
    """
    n_U = draw.count_per_sample(draw.maskable_BL)
    n_anchor_U = draw.count_per_sample(anchor.mask_BL)
    # The published code computes r and s r in float32 and truncates the product with n in double:
    # 6 of 28 with s = 1.5 gives 8, not 9. We reproduce its counts exactly.
    ratio_U = n_anchor_U.float() / n_U.clamp(min=1).float()
    pre_ratio_U = (ratio_U * plan.pre_anchor_scale).clamp(max=1)
    count_U = torch.maximum((n_U.double() * pre_ratio_U.double()).long(), n_anchor_U)

    masks, weights = [], []
    for steps_left in range(plan.inner_steps - 1, -1, -1):
        realised_U = (count_U.float() / n_U.clamp(min=1).float()).double()
        # A sample without masked tokens has no scored token. Its weight is never read, but must be finite.
        weights.append(plan.weight(torch.where(count_U > 0, realised_U, 1.0)))
        # The last state is the anchor and shares the anchor's trunk pass.
        is_anchor = steps_left == 0 and plan.inner_steps > 1
        masks.append(anchor.mask_BL if is_anchor else draw.smallest(draw.u_BL, count_U))
        if steps_left:
            count_U = count_U - (count_U - n_anchor_U + steps_left - 1) // steps_left
    return _chain(masks, weights, ends_at_anchor=plan.inner_steps > 1)


def _pre_anchor_only(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """Return the pre-anchor as the only state; its next state, which a teacher reads, is still the anchor."""
    return _anchor_consistent(draw, anchor, replace(plan, inner_steps=2))[:1]


def _anchor_only(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """Return the anchor as the only state, weighted by w(t) at its noise level t, not at its realised mask ratio."""
    return [replace(anchor, weight_U=plan.weight(draw.t_U))]


def _progressive(draw: Draw, anchor: State, plan: Plan) -> list[State]:
    """Return K states with mask ratios from 0.8 to `progressive_end`, independent of the anchor.

    The paper calls them "inconsistent". The first state masks every maskable token with probability 0.8. Each further
    state keeps at most int(n * ratio) of these tokens masked. With K = 1 the only state has the ratio
    `progressive_end`. The loss weight is w(nominal ratio), not w(realised ratio).
    """
    first, last = PROGRESSIVE_START, plan.progressive_end
    # The order of operations matters: from 0.8 to 0.2, the last ratio is 0.2 - 4e-17, so that int(30 * ratio) is 5.
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
# Trajectories of one state: they take one inner step for any K.
SINGLE_STATE = ("pre_anchor_only", "anchor_only")

# (state, anchor) -> scored tokens of the state, by kind of supervision. "masked" and "newly_revealed" are equal if the
# next state is the clean sequence. With "anchor", nested states score the tokens of the anchor alone; a `progressive`
# state scores those of its masked tokens that the anchor masks, too.
SUPERVISION: dict[str, Callable[[State, State], Tensor]] = {
    "masked": lambda state, anchor: state.mask_BL,
    "newly_revealed": lambda state, anchor: state.mask_BL if state.next_BL is None else state.mask_BL & ~state.next_BL,
    "anchor": lambda state, anchor: state.mask_BL & anchor.mask_BL,
}


def smallest(u_BL: Tensor, maskable_BL: Tensor, count_U: Tensor, documents: Documents | None = None) -> Tensor:
    """Return the mask, bool `[B, L]`, of the `count_U` maskable tokens with the smallest u in every sample."""
    u_BL = torch.where(maskable_BL, u_BL, 2.0)
    rank_BL = u_BL.argsort(1).argsort(1) if documents is None else documents.rank_within_sample(u_BL)
    return maskable_BL & (rank_BL < broadcast_to_tokens(count_U, documents))


def _chain(masks: Sequence[Tensor], weights: Sequence[Tensor], ends_at_anchor: bool = False) -> list[State]:
    """Build the states of consecutive masks; the clean sequence follows the last one.

    Args:
        masks: one mask for each state, `[B, L]`.
        weights: one loss weight for each state, `[U]`.
        ends_at_anchor: the last mask is the anchor's, so that its state shares the anchor's input.
    """
    numbers = list(range(ANCHOR_INPUT + 1, ANCHOR_INPUT + 1 + len(masks)))
    if ends_at_anchor:
        numbers[-1] = ANCHOR_INPUT
    successors = zip([*masks[1:], None], [*numbers[1:], None], strict=True)
    return [
        State(mask, mask, weight, next_mask, number, next_number)
        for mask, weight, number, (next_mask, next_number) in zip(masks, weights, numbers, successors, strict=True)
    ]
