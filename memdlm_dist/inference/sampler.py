"""Denoising: fills the [MASK] positions of a canvas, block by block, the most confident ones first (LLaDA).

Shapes: B sequences, L tokens, N predicted positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from memdlm_dist.errors import UserError
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream

# (tokens [B, L], targets [B, L] bool) -> logits [N, V] of the targets, in the order of the flattened canvas; on the
# host.
Predict = Callable[[Tensor, Tensor], Tensor]
Remasking = Literal["low_confidence", "random"]

# No canvas is so long: keys of tokens are made of the sequence's id and the position.
_LONGEST = 2**24


@dataclass(frozen=True)
class Decoding:
    """How a canvas is filled.

    Attributes:
        block_size: open positions of a block; blocks are filled from left to right.
        steps: predictions per block; a near-equal number of tokens is kept at each. None: one token a step.
        temperature: 0 is greedy; above it the choice is of logits plus Gumbel noise times the temperature.
        remasking: which predictions of a step are kept: those with the highest probability, or random ones.
        stop_at_eos: once a block of the response holds end-of-text, nothing after that is predicted.
        seed: of temperature and random remasking.
    """

    block_size: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    stop_at_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1 or (self.steps is not None and self.steps < 1) or self.temperature < 0:
            raise UserError(
                f"block_size = {self.block_size} and steps = {self.steps} must be at least 1, temperature = "
                f"{self.temperature} not negative."
            )
        if self.remasking not in get_args(Remasking):
            raise UserError(f"remasking must be one of {', '.join(get_args(Remasking))}, not {self.remasking}.")


class Canvas(NamedTuple):
    """Prompts with room for their responses, on the host."""

    tokens_BL: Tensor  # int64
    attended_BL: Tensor  # bool: False on the fill behind shorter rows
    open_BL: Tensor  # bool: [MASK] positions to be filled
    response_BL: Tensor  # bool: those of them that follow the prompt
    ids_B: Tensor  # int64, the keys of each row's random numbers


def canvas(
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    mask_id: int,
    eos_id: int,
    ids: Sequence[int] | None = None,
    multiple: int = 1,
) -> Canvas:
    """Lay out prompts of any length.

    Args:
        prompts: token ids; [MASK] among them is to be filled too.
        new_tokens: [MASK] positions to append, for all or for each.
        mask_id, eos_id: end-of-text fills the shorter rows, and is not attended to.
        ids: of the rows; their numbers if None.
        multiple: of which the length shall be, the number of sequence shards.
    """
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    ends = torch.tensor([len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    length = max(1, int(ends.max()))
    length += -length % multiple
    tokens_BL = torch.full((len(prompts), length), eos_id)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    place_L = torch.arange(length)
    attended_BL = place_L < ends[:, None]
    response_BL = attended_BL & (place_L >= starts[:, None])
    tokens_BL[response_BL] = mask_id
    return Canvas(
        tokens_BL,
        attended_BL,
        attended_BL & (tokens_BL == mask_id),
        response_BL,
        torch.tensor(range(len(prompts)) if ids is None else ids, dtype=torch.int64),
    )


class Step(NamedTuple):
    """The canvas after a step."""

    tokens_BL: Tensor
    open_BL: Tensor  # bool: still [MASK]
    kept_BL: Tensor  # bool: decided at this step


def denoise(
    predict: Predict,
    start: Canvas,
    decoding: Decoding,
    mask_id: int,
    eos_id: int,
    agree: Callable[[int], int] = lambda count: count,
) -> Iterator[Step]:
    """Fill a canvas; yields it after every step, and once more if end-of-text fills the rest.

    A block is `block_size` of a row's open positions in their order, wherever they lie. Positions that are not open
    never change. What a row becomes does not depend on the rows beside it.

    Args:
        predict: the model.
        start: is not modified.
        mask_id: is never chosen.
        agree: the largest of a number over all ranks that have to call `predict` together.
    """
    tokens_BL, open_BL = start.tokens_BL.clone(), start.open_BL.clone()
    per_block = decoding.steps or decoding.block_size
    block_BL = torch.where(open_BL, (open_BL.cumsum(1) - 1) // decoding.block_size, -1)
    for block in range(agree(int(block_BL.max()) + 1)):
        block_open_BL = open_BL & (block_BL == block)
        # More steps than open positions would repeat predictions of an unchanged canvas.
        for left in range(min(per_block, agree(int(block_open_BL.sum(1).max()))), 0, -1):
            target_BL = block_open_BL & open_BL
            # As the published sampler does: the nearest to an equal share of what is left, halves to the even number.
            share_B = (target_BL.sum(1).double() / left).round().long()
            logits_NV = predict(tokens_BL, target_BL)
            logits_NV[:, mask_id] = -torch.inf
            # By how much of its row is decided, not by the step: rows beside it change the number of steps.
            decided_B = (start.open_BL & ~open_BL).sum(1)
            chosen_N, confidence_N = _choose(logits_NV, decoding, target_BL, start.ids_B, decided_B)
            kept_BL = _most_confident(confidence_N, target_BL, share_B)
            tokens_BL = tokens_BL.masked_scatter(kept_BL, chosen_N[kept_BL[target_BL]])
            open_BL = open_BL & ~kept_BL
            yield Step(tokens_BL, open_BL, kept_BL)
        if decoding.stop_at_eos:
            ended_BL = (start.response_BL & ~open_BL & (tokens_BL == eos_id)).cumsum(1) > 0
            rest_BL = open_BL & ended_BL
            if rest_BL.any():
                tokens_BL = tokens_BL.masked_fill(rest_BL, eos_id)
                open_BL = open_BL & ~rest_BL
                yield Step(tokens_BL, open_BL, rest_BL)


def _choose(
    logits_NV: Tensor, decoding: Decoding, target_BL: Tensor, ids_B: Tensor, decided_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The token of each target, and how sure it is: the token's probability, or a random number."""
    row_N, place_N = target_BL.nonzero(as_tuple=True)
    keys_N = keyed_random.key(decoding.seed, Stream.DECODING, decided_B[row_N], ids_B[row_N] * _LONGEST + place_N)
    noisy_NV = logits_NV
    if decoding.temperature > 0:
        u_NV = keyed_random.uniform(keys_N, torch.arange(1, 1 + logits_NV.shape[1]))
        noisy_NV = logits_NV.double() - decoding.temperature * (-u_NV.clamp(min=2.0**-53).log()).log()
    chosen_N = noisy_NV.argmax(-1)
    if decoding.remasking == "random":
        return chosen_N, keyed_random.uniform(keys_N, torch.zeros(1, dtype=torch.int64)).squeeze(-1)
    return chosen_N, logits_NV.softmax(-1).gather(1, chosen_N.unsqueeze(1)).squeeze(1)


def _most_confident(confidence_N: Tensor, target_BL: Tensor, share_B: Tensor) -> Tensor:
    """Mask of every row's `share_B` targets with the highest confidence."""
    confidence_BL = torch.full(target_BL.shape, -torch.inf, dtype=confidence_N.dtype)
    confidence_BL = confidence_BL.masked_scatter(target_BL, confidence_N)
    rank_BL = confidence_BL.argsort(dim=1, descending=True, stable=True).argsort(1)
    return target_BL & (rank_BL < share_B.unsqueeze(1))


def finished(steps: Iterator[Step], start: Canvas) -> Tensor:
    """The tokens after the last step, `[B, L]`."""
    tokens_BL = start.tokens_BL
    for step in steps:
        tokens_BL = step.tokens_BL
    return tokens_BL


def responses(tokens_BL: Tensor, start: Canvas, eos_id: int) -> list[list[int]]:
    """Token ids of every row's response, up to end-of-text."""
    rows = [tokens[response].tolist() for tokens, response in zip(tokens_BL, start.response_BL, strict=True)]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
