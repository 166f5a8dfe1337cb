"""The simulated denoising trajectory of a micro-batch: anchor, inner states, and what is scored at each.

Everything here runs on the host, before the micro-batch goes to the device: the number of masked
tokens is then known to Python, and only masked positions need ever reach the output head, without a
host-device synchronisation.

A sample is a row, or a document of a packed row (documents.py): it has a noise level and ratios of its own.

Shapes: B rows, L tokens, U samples (B of them, but for packed rows), S sequence shards (context-parallel ranks, and
tensor-parallel ones within them), M scored tokens of one shard, N = S * M scored tokens in all, K inner steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from memdlm_dist import keyed_random
from memdlm_dist.diffusion import level_from_uniform, noise_at
from memdlm_dist.documents import Documents
from memdlm_dist.keyed_random import Stream

IGNORE_INDEX = -100

# Into how many sizes the number of scored positions is rounded.
_HEAD_SHAPES = 16

# Mask ratios between which the `progressive` trajectory runs, whatever the anchor's.
PROGRESSIVE_RATIOS = (0.8, 0.2)


class Draw(NamedTuple):
    """What is random about a micro-batch's masks, and what may be masked."""

    maskable_BL: Tensor  # bool
    t_U: Tensor  # float64: noise level of the outer loss
    u_BL: Tensor  # float64, uniform on [0, 1): behind the anchor and the states nested around it
    v_BL: Tensor  # the same, independent of u: behind states that are independent of the anchor
    documents: Documents | None = None  # where these are the samples, and not the rows

    def tally(self, chosen_BL: Tensor) -> Tensor:
        """Number of chosen tokens of every sample, int64 `[U]`."""
        return _tally(chosen_BL, self.documents)

    def spread(self, value_U: Tensor) -> Tensor:
        """What holds of each sample, as it is to be combined with its tokens: `[B, L]` or `[B, 1]`."""
        return _spread(value_U, self.documents)

    def smallest(self, u_BL: Tensor, count_U: Tensor) -> Tensor:
        """Mask of every sample's `count_U` maskable tokens with the smallest u."""
        return smallest(u_BL, self.maskable_BL, count_U, self.documents)


@dataclass(frozen=True)
class State:
    """One point of a trajectory, as masks."""

    mask_BL: Tensor  # bool: shown to the model as [MASK]
    target_BL: Tensor  # bool: scored, a subset of the mask
    weight_U: Tensor  # float32: loss weight of the sample's tokens
    next_BL: Tensor | None = None  # mask of the state that follows; None: the clean sequence does


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


class Scored(NamedTuple):
    """The scored tokens of a state, gathered for the output head.

    Shard s holds the activations of tokens [s L/S, (s+1) L/S) of every row. Each tensor-parallel rank picks
    its own masked positions, M of them with padding, and the head sees the concatenation over these
    ranks; labels, weights and samples are those of the concatenation and equal on all of them.
    """

    index_SM: Tensor  # int64: position in the rank's flattened [B * L/S] activations
    label_N: Tensor  # int64
    weight_N: Tensor  # float32: the sample's weight
    sample_N: Tensor  # int64
    valid_N: Tensor  # bool: False on padding
    count_U: Tensor  # int64: scored tokens of each sample, on all context-parallel ranks

    def part(self, number: int, parts: int) -> "Scored":
        """Of so many consecutive parts of the shards, the tokens of one."""
        rows = slice(number * (size := len(self.index_SM) // parts), (number + 1) * size)

        def own(x_N: Tensor) -> Tensor:
            return x_N.view_as(self.index_SM)[rows].flatten()

        return Scored(
            self.index_SM[rows],
            own(self.label_N),
            own(self.weight_N),
            own(self.sample_N),
            own(self.valid_N),
            self.count_U,
        )


class InnerStep(NamedTuple):
    """One step of the inner loop: which of the micro-batch's inputs are read, and what is scored."""

    student: int
    teacher: int | None  # None where the inner loss has no teacher
    scored: Scored


class MicroBatch(NamedTuple):
    """A micro-batch with its noise drawn: the outer loss's view and the K inner ones.

    States that are the same share one entry of `inputs`, so that one pass of the trunk serves them.
    """

    inputs: tuple[Tensor, ...]  # int64 [B, L] each: what the model may read; the anchor comes first
    anchor: Scored
    inner: tuple[InnerStep, ...]
    sample_ids_U: Tensor
    masked: Tensor  # number of tokens that the anchor masks, scalar: of the whole rows
    maskable: Tensor  # and of those that may be masked
    length: int  # of the whole rows
    attended_BL: Tensor | None = None  # bool, the tokens that are attended to; None: all
    documents: Documents | None = None  # of the whole rows, where these are packed
    first: int = 0  # which token of the whole rows comes first here

    def part(self, number: int, parts: int) -> "MicroBatch":
        """What a context-parallel rank has of it: one of so many consecutive parts of every row."""
        if parts == 1:
            return self
        width = self.length // parts
        columns = slice(number * width, (number + 1) * width)
        return self._replace(
            inputs=tuple(x_BL[:, columns] for x_BL in self.inputs),
            anchor=self.anchor.part(number, parts),
            inner=tuple(step._replace(scored=step.scored.part(number, parts)) for step in self.inner),
            first=columns.start,
        )

    def to(self, device: torch.device | str) -> "MicroBatch":
        return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), self)


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
        return keyed_random.uniform(documents.spread(key_U), documents.place_BL.unsqueeze(-1)).squeeze(-1)

    if t_U is None:
        u_U1 = keyed_random.uniform(keyed_random.key(seed, Stream.LEVEL, step, sample_ids_U), torch.arange(1))
        t_U = level_from_uniform(u_U1.squeeze(-1))
    return Draw(maskable_BL, t_U, of_tokens(Stream.MASK), of_tokens(Stream.INNER_MASK), documents)


def anchor_state(draw: Draw, schedule: str, weight: str) -> State:
    """The outer loss's corruption: maskable tokens with u below the mask probability at t."""
    noise = noise_at(draw.t_U, schedule, weight)
    mask_BL = draw.maskable_BL & (draw.u_BL < draw.spread(noise.mask_probability))
    return State(mask_BL, mask_BL, noise.weight.float())


def prompt_anchor(draw: Draw, ratio: float) -> State:
    """The anchor of a prompt that is to be remembered: int(n * ratio) of its n maskable tokens, at least one."""
    n_U = draw.tally(draw.maskable_BL)
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
    n_U = draw.tally(draw.maskable_BL)
    floor_U = draw.tally(anchor.mask_BL)
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
        # The last state is the anchor, and the same tensor: it is to share the anchor's trunk pass.
        is_anchor = left == 0 and plan.inner_steps > 1
        masks.append(anchor.mask_BL if is_anchor else draw.smallest(draw.u_BL, count_U))
        if left:
            count_U = count_U - (count_U - floor_U + left - 1) // left
    return _chain(masks, weights)


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
    n_U = draw.tally(draw.maskable_BL)
    count_U = draw.tally(draw.maskable_BL & (draw.v_BL < ratios[0]))
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
    rank_BL = u_BL.argsort(1).argsort(1) if documents is None else documents.rank(u_BL)
    return maskable_BL & (rank_BL < _spread(count_U, documents))


def _tally(chosen_BL: Tensor, documents: Documents | None) -> Tensor:
    return chosen_BL.sum(1) if documents is None else documents.tally(chosen_BL)


def _spread(value_U: Tensor, documents: Documents | None) -> Tensor:
    return value_U.unsqueeze(1) if documents is None else documents.spread(value_U)


def _chain(masks: Sequence[Tensor], weights: Sequence[Tensor]) -> list[State]:
    following = [*masks[1:], None]
    return [State(mask, mask, weight, after) for mask, weight, after in zip(masks, weights, following, strict=True)]


def micro_batch(
    tokens_BL: Tensor,
    maskable_BL: Tensor,
    sample_ids_U: Tensor,
    anchor: State,
    states: Sequence[State],
    mask_token_id: int,
    with_teacher: bool = False,
    shards: int = 1,
    shifted: bool = False,
    documents: Documents | None = None,
) -> MicroBatch:
    """Corrupt the clean tokens by every state and gather what is scored.

    Args:
        tokens_BL: clean tokens.
        maskable_BL: bool, the tokens that may be masked.
        sample_ids_U: global sample ids.
        anchor: the state of the outer loss.
        states: those of the inner loop. States whose masks are one tensor object share an input. Equal
            values are not looked for: ranks would then differ in their passes, and in their collectives.
        mask_token_id: what a masked token is shown as.
        with_teacher: the inner loss compares with a prediction from the next state.
        shards: number of sequence shards S, by which L must be divisible.
        shifted: the backbone predicts the next token; see `gather_scored`.
        documents: of packed rows.
    """
    inputs: dict[int, tuple[int, Tensor]] = {}  # id of a mask -> number and tokens; the states keep the masks alive

    def number(mask_BL: Tensor | None) -> int:
        if id(mask_BL) not in inputs:
            noisy_BL = tokens_BL if mask_BL is None else torch.where(mask_BL, mask_token_id, tokens_BL)
            inputs[id(mask_BL)] = (len(inputs), noisy_BL)
        return inputs[id(mask_BL)][0]

    number(anchor.mask_BL)
    inner = tuple(
        InnerStep(
            student=number(state.mask_BL),
            teacher=number(state.next_BL) if with_teacher else None,
            scored=gather_scored(state, tokens_BL, shards, shifted, documents),
        )
        for state in states
    )
    return MicroBatch(
        inputs=tuple(noisy_BL for _, noisy_BL in inputs.values()),
        anchor=gather_scored(anchor, tokens_BL, shards, shifted, documents),
        inner=inner,
        sample_ids_U=sample_ids_U,
        masked=anchor.mask_BL.sum(),
        maskable=maskable_BL.sum(),
        length=tokens_BL.shape[1],
        documents=documents,
    )


def gather_scored(
    state: State,
    tokens_BL: Tensor,
    shards: int = 1,
    shifted: bool = False,
    documents: Documents | None = None,
) -> Scored:
    """Positions, labels and weights of a state's targets; see `Scored`.

    A backbone that was converted from an autoregressive one predicts a token at the position before it
    (`shifted`): that position is picked. The first token of a sample, which has none before it, cannot be a
    target then.

    M is the largest number of targets in one shard, rounded up to a sixteenth of its tokens: the head then
    sees few different shapes, which DTensor and compilers keep the preparation of; and never runs on nothing.
    """
    batch, length = tokens_BL.shape
    assert length % shards == 0, "the sequence length must be divisible by the number of shards"
    width = length // shards
    target_BL, count_U = state.target_BL, _tally(state.target_BL, documents)
    sample_BL = torch.arange(batch).unsqueeze(1).expand(batch, length) if documents is None else documents.sample_BL
    if shifted:
        target_BL, tokens_BL, sample_BL = (x.roll(-1, dims=1) for x in (target_BL, tokens_BL, sample_BL))

    def by_shard(x_BL: Tensor) -> Tensor:
        return x_BL.reshape(batch, shards, width).transpose(0, 1).reshape(shards, batch * width)

    target_SP = by_shard(target_BL)
    count_S = target_SP.sum(1)
    quantum = -(-batch * width // _HEAD_SHAPES)
    slots = quantum * max(1, -(-int(count_S.max()) // quantum))
    slots = min(slots, batch * width)
    index_SM = target_SP.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    valid_SM = torch.arange(slots) < count_S.unsqueeze(1)
    sample_N = by_shard(sample_BL).gather(1, index_SM).flatten()
    return Scored(
        index_SM=index_SM,
        label_N=by_shard(tokens_BL).gather(1, index_SM).flatten(),
        weight_N=state.weight_U[sample_N],
        sample_N=sample_N,
        valid_N=valid_SM.flatten(),
        count_U=count_U,
    )
