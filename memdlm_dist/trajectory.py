"""The simulated denoising trajectory of a micro-batch: anchor, pre-anchor, and what is scored at each.

Everything here runs on the host, before the micro-batch goes to the device: the number of masked
tokens is then known to Python, and only masked positions need ever reach the output head, without a
host-device synchronisation.

Shapes: B sequences, L tokens, S sequence shards (tensor-parallel ranks under sequence parallelism),
M scored tokens of one shard, N = S * M scored tokens in all, K inner steps.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from memdlm_dist import keyed_random
from memdlm_dist.diffusion import level_from_uniform, noise_at
from memdlm_dist.keyed_random import Stream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class State:
    """One point of a trajectory, as masks."""

    mask_BL: Tensor  # bool: shown to the model as [MASK]
    target_BL: Tensor  # bool: scored, a subset of the mask
    weight_B: Tensor  # float32: loss weight of the row's tokens


@dataclass(frozen=True)
class Scored:
    """The scored tokens of a state, gathered for the output head.

    Sequence-parallel rank s holds the activations of tokens [s L/S, (s+1) L/S) of every row. Each
    rank picks its own masked positions, M of them with padding, and the head sees the concatenation
    over ranks; labels, weights and rows are those of the concatenation and equal on all ranks.
    """

    index_SM: Tensor  # int64: position in the rank's flattened [B * L/S] activations
    label_N: Tensor  # int64
    weight_N: Tensor  # float32: the row's weight
    row_N: Tensor  # int64
    valid_N: Tensor  # bool: False on padding


@dataclass(frozen=True)
class View:
    """What the model reads at a state, and what is asked of it."""

    tokens_BL: Tensor
    scored: Scored

    def to(self, device: torch.device) -> "View":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        scored = Scored(**{f.name: move(getattr(self.scored, f.name)) for f in fields(Scored)})
        return View(move(self.tokens_BL), scored)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with its noise drawn: the outer view and the K inner ones.

    `inner[-1]` reads the same tokens as `anchor`, so that one pass of the trunk serves both.
    """

    anchor: View
    inner: tuple[View, ...]
    sample_ids_B: Tensor
    mask_ratio: Tensor  # masked over maskable tokens of the anchor, scalar

    def to(self, device: torch.device) -> "MicroBatch":
        return replace(
            self,
            anchor=self.anchor.to(device),
            inner=tuple(view.to(device) for view in self.inner),
            sample_ids_B=self.sample_ids_B.to(device),
            mask_ratio=self.mask_ratio.to(device),
        )


def noise_levels(seed: int, step: int, sample_ids_B: Tensor) -> Tensor:
    """Keyed noise level t of every row, float64 `[B]`."""
    keys_B = keyed_random.key(seed, Stream.LEVEL, step, sample_ids_B)
    return level_from_uniform(keyed_random.uniform(keys_B, torch.zeros(1, dtype=torch.int64)).squeeze(-1))


def token_noise(seed: int, step: int, sample_ids_B: Tensor, length: int) -> Tensor:
    """Keyed uniform number of every token, float64 `[B, L]`: the one draw behind all masks of a row."""
    keys_B = keyed_random.key(seed, Stream.MASK, step, sample_ids_B)
    return keyed_random.uniform(keys_B, torch.arange(length))


def anchor_state(u_BL: Tensor, maskable_BL: Tensor, t_B: Tensor, schedule: str, weight: str) -> State:
    """The outer loss's corruption: maskable tokens with u below the mask probability at t."""
    noise = noise_at(t_B, schedule, weight)
    mask_BL = maskable_BL & (u_BL < noise.mask_probability.unsqueeze(-1))
    return State(mask_BL, mask_BL, noise.weight.float())


def anchor_consistent(
    u_BL: Tensor,
    maskable_BL: Tensor,
    anchor: State,
    inner_steps: int,
    scale: float,
    schedule: str,
    weight: str,
) -> list[State]:
    """K states from the pre-anchor down to the anchor, nested by construction.

    The pre-anchor masks int(n * r_pre) of the n maskable tokens, r_pre = min(1, s r), and at least the
    anchor's own, where r is the realised mask ratio; each further state reveals ceil(left / steps left)
    of the extra ones; the last state is the anchor. A state's masks are the tokens with the smallest u.
    Its weight is w at the state's own realised ratio.

    Args:
        u_BL: the draw that also made the anchor.
        inner_steps: K >= 2.
        scale: s > 0.
    """
    n_B = maskable_BL.sum(1)
    floor_B = anchor.mask_BL.sum(1)
    # The published code rounds r and min(1, s r) to float32 and truncates the product in double:
    # 6 of 28 with s = 1.5 gives 8, not 9. We reproduce its counts exactly.
    ratio_B = (floor_B.double() / n_B.clamp(min=1)).float()
    pre_ratio_B = (scale * ratio_B.double()).clamp(max=1).float()
    count_B = torch.maximum((n_B.double() * pre_ratio_B.double()).long(), floor_B)

    rank_BL = torch.where(maskable_BL, u_BL, 2.0).argsort(1).argsort(1)
    states = []
    for step in range(inner_steps):
        mask_BL = maskable_BL & (rank_BL < count_B.unsqueeze(1))
        realised_B = count_B.double() / n_B.clamp(min=1)
        # A row with nothing masked has no scored token, so its weight is never read; keep it finite.
        level_B = torch.where(count_B > 0, realised_B.float().double(), 1.0)
        states.append(State(mask_BL, mask_BL, noise_at(level_B, schedule, weight).weight.float()))
        remaining_steps = inner_steps - 1 - step
        if remaining_steps:
            count_B = count_B - (count_B - floor_B + remaining_steps - 1) // remaining_steps
    return states


def view(state: State, tokens_BL: Tensor, mask_token_id: int, shards: int = 1) -> View:
    """Corrupt the clean tokens by `state` and gather its scored positions for `shards` sequence shards."""
    noisy_BL = torch.where(state.mask_BL, mask_token_id, tokens_BL)
    return View(noisy_BL, gather_scored(state, tokens_BL, shards))


def gather_scored(state: State, tokens_BL: Tensor, shards: int = 1) -> Scored:
    """Positions, labels and weights of a state's targets; see `Scored`.

    M is the largest number of targets in one shard, at least 1, so that no rank's head runs on nothing.
    """
    batch, length = tokens_BL.shape
    assert length % shards == 0, "the sequence length must be divisible by the tensor-parallel degree"
    width = length // shards

    def by_shard(x_BL: Tensor) -> Tensor:
        return x_BL.reshape(batch, shards, width).transpose(0, 1).reshape(shards, batch * width)

    target_SP = by_shard(state.target_BL)
    count_S = target_SP.sum(1)
    slots = max(1, int(count_S.max()))
    index_SM = target_SP.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    valid_SM = torch.arange(slots) < count_S.unsqueeze(1)
    row_SM = index_SM // width
    return Scored(
        index_SM=index_SM,
        label_N=by_shard(tokens_BL).gather(1, index_SM).flatten(),
        weight_N=state.weight_B[row_SM].flatten(),
        row_N=row_SM.flatten(),
        valid_N=valid_SM.flatten(),
    )
