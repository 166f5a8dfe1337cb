"""Denoising as in LLaDA: fills the [MASK] positions of a canvas block by block, the most confident first.

Shapes: B sequences, L tokens, N predicted positions, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from memdlm_dist.errors import UserError
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream

# (tokens [B, L], targets bool [B, L]) -> logits [N, V] of the targets in flattened order; all on the host.
Predict = Callable[[Tensor, Tensor], Tensor]
Remasking = Literal["low_confidence", "random"]

# Upper limit of a canvas's length: the random key of a token is its row's id times this plus its position.
_MAX_LENGTH = 2**24


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    Attributes:
        block_size: open positions per block; blocks are decoded from left to right.
        steps: steps per block; each step keeps a near-equal number of tokens. None: one token per step.
        temperature: factor of the Gumbel noise that is added to the logits; 0 is greedy.
        remasking: choice of the predictions that a step keeps: the most probable ("low_confidence") or random ones.
        stop_at_eos: end a row after the block in which its response contains end-of-text.
        seed: seed of temperature and random remasking.
        cfg_scale: scale s of classifier-free guidance as in LLaDA (arXiv 2502.09992). The logits are
            u + (s + 1) (c - u), where c reads the canvas, and u reads it with [MASK]s in place of the prompt's tokens.
            0: no guidance, and no second forward pass.
        suppress_tokens: ids of tokens that are never predicted.
    """

    block_size: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    stop_at_eos: bool = True
    seed: int = 0
    cfg_scale: float = 0.0
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size < 1 or (self.steps is not None and self.steps < 1) or self.temperature < 0:
            raise UserError(
                f"block_size = {self.block_size} and steps = {self.steps} must be at least 1, temperature = "
                f"{self.temperature} not negative."
            )
        if self.remasking not in get_args(Remasking):
            raise UserError(f"remasking must be one of {', '.join(get_args(Remasking))}, not {self.remasking}.")
        if not 0 <= self.cfg_scale < math.inf:
            raise UserError(f"cfg_scale must be a finite number of at least 0, but is {self.cfg_scale}.")

    def check_vocabulary(self, size: int) -> None:
        """Check the suppressed tokens against a vocabulary of `size` tokens.

        Raises:
            UserError: if a token is outside the vocabulary, or if no token but [MASK] is left.
        """
        for token_id in self.suppress_tokens:
            if not 0 <= token_id < size:
                raise UserError(
                    f"The suppressed token {token_id} is outside the model's vocabulary, 0 to {size - 1}; remove it."
                )
        if len(set(self.suppress_tokens)) >= size - 1:
            raise UserError("The suppressed tokens leave no token to predict; suppress fewer.")


class Canvas(NamedTuple):
    """Rows of prompts, [MASK]s for their responses and padding, on the host."""

    tokens_BL: Tensor  # int64
    attended_BL: Tensor  # bool: False on padding
    open_BL: Tensor  # bool: [MASK] positions to fill in
    response_BL: Tensor  # bool: positions of the response
    ids_B: Tensor  # int64: row ids, which key each row's random numbers


def canvas(
    prompts: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    mask_id: int,
    eos_id: int,
    ids: Sequence[int] | None = None,
    multiple: int = 1,
) -> Canvas:
    """Build a canvas of prompts of any length.

    Args:
        prompts: token ids; [MASK]s in a prompt are filled in too.
        new_tokens: number of [MASK] positions to append, one for all prompts or one per prompt.
        mask_id: token id of [MASK].
        eos_id: token id of end-of-text, which pads the shorter rows and is not attended to there.
        ids: ids of the rows; 0, 1, ... if None.
        multiple: the canvas's length is rounded up to a multiple of this, the number of sequence shards.
    """
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    ends = torch.tensor([len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    length = max(1, int(ends.max()))
    length += -length % multiple
    tokens_BL = torch.full((len(prompts), length), eos_id)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    position_L = torch.arange(length)
    attended_BL = position_L < ends[:, None]
    response_BL = attended_BL & (position_L >= starts[:, None])
    tokens_BL[response_BL] = mask_id
    return Canvas(
        tokens_BL,
        attended_BL,
        attended_BL & (tokens_BL == mask_id),
        response_BL,
        torch.tensor(range(len(prompts)) if ids is None else ids, dtype=torch.int64),
    )


class Step(NamedTuple):
    """Canvas after a step."""

    tokens_BL: Tensor
    open_BL: Tensor  # bool: still [MASK]
    kept_BL: Tensor  # bool: filled in at this step


def denoise(
    predict: Predict,
    start: Canvas,
    decoding: Decoding,
    mask_id: int,
    eos_id: int,
    max_over_ranks: Callable[[int], int] = lambda count: count,
) -> Iterator[Step]:
    """Decode a canvas; yield it after every step, and again when end-of-text replaces the rest of a row.

    A block is the next `block_size` open positions of a row; other tokens between them are not counted.
    Tokens at positions that are not open never change. The result of a row does not depend on the other rows.

    Args:
        predict: the model; called twice per step with classifier-free guidance.
        start: canvas to decode; not modified.
        mask_id: token id of [MASK], which is never predicted.
        eos_id: token id of end-of-text.
        max_over_ranks: maximum of a number over all ranks that must call `predict` together.
    """
    if decoding.cfg_scale:
        predict = _guided(predict, start, decoding.cfg_scale, mask_id)
    never_predicted = [mask_id, *decoding.suppress_tokens]
    tokens_BL, open_BL = start.tokens_BL.clone(), start.open_BL.clone()
    per_block = decoding.steps or decoding.block_size
    block_BL = torch.where(open_BL, (open_BL.cumsum(1) - 1) // decoding.block_size, -1)
    for block in range(max_over_ranks(int(block_BL.max()) + 1)):
        block_open_BL = open_BL & (block_BL == block)
        # More steps than open positions would predict from an unchanged canvas.
        for left in range(min(per_block, max_over_ranks(int(block_open_BL.sum(1).max()))), 0, -1):
            target_BL = block_open_BL & open_BL
            # Equal share of the remaining positions, rounded half to even as in the published sampler.
            share_B = (target_BL.sum(1).double() / left).round().long()
            logits_NV = predict(tokens_BL, target_BL)
            logits_NV[:, never_predicted] = -torch.inf
            # Key of the random numbers. Not the step: the number of steps depends on the other rows.
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


def _guided(predict: Predict, start: Canvas, scale: float, mask_id: int) -> Predict:
    """Return the prediction with classifier-free guidance, from two calls of `predict`.

    The second call reads [MASK] at the attended positions that are not open at the start: the tokens of the prompt.
    """
    given_BL = start.attended_BL & ~start.open_BL

    def predict_guided(tokens_BL: Tensor, target_BL: Tensor) -> Tensor:
        conditional_NV = predict(tokens_BL, target_BL)
        unconditional_NV = predict(tokens_BL.masked_fill(given_BL, mask_id), target_BL)
        return unconditional_NV + (scale + 1) * (conditional_NV - unconditional_NV)

    return predict_guided


def _choose(
    logits_NV: Tensor, decoding: Decoding, target_BL: Tensor, ids_B: Tensor, decided_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the predicted token of each target and its confidence: its probability, or a random number."""
    row_N, position_N = target_BL.nonzero(as_tuple=True)
    keys_N = keyed_random.key(decoding.seed, Stream.DECODING, decided_B[row_N], ids_B[row_N] * _MAX_LENGTH + position_N)
    noisy_NV = logits_NV
    if decoding.temperature > 0:
        u_NV = keyed_random.uniform(keys_N, torch.arange(1, 1 + logits_NV.shape[1]))
        noisy_NV = logits_NV.double() - decoding.temperature * (-u_NV.clamp(min=2.0**-53).log()).log()
    chosen_N = noisy_NV.argmax(-1)
    if decoding.remasking == "random":
        return chosen_N, keyed_random.uniform(keys_N, torch.zeros(1, dtype=torch.int64)).squeeze(-1)
    return chosen_N, logits_NV.softmax(-1).gather(1, chosen_N.unsqueeze(1)).squeeze(1)


def _most_confident(confidence_N: Tensor, target_BL: Tensor, share_B: Tensor) -> Tensor:
    """Return the mask of the `share_B` most confident targets of each row, bool `[B, L]`."""
    confidence_BL = torch.full(target_BL.shape, -torch.inf, dtype=confidence_N.dtype)
    confidence_BL = confidence_BL.masked_scatter(target_BL, confidence_N)
    rank_BL = confidence_BL.argsort(dim=1, descending=True, stable=True).argsort(1)
    return target_BL & (rank_BL < share_B.unsqueeze(1))


def finished(steps: Iterator[Step], start: Canvas) -> Tensor:
    """Run all steps and return the final tokens, `[B, L]`."""
    tokens_BL = start.tokens_BL
    for step in steps:
        tokens_BL = step.tokens_BL
    return tokens_BL


def responses(tokens_BL: Tensor, start: Canvas, eos_id: int) -> list[list[int]]:
    """Return the token ids of each row's response, up to end-of-text."""
    rows = [tokens[response].tolist() for tokens, response in zip(tokens_BL, start.response_BL, strict=True)]
    return [until(row, {eos_id}) for row in rows]


def until(ids: Sequence[int], stops: Collection[int | None]) -> list[int]:
    """Return the token ids before the first one in `stops`."""
    return list(takewhile(lambda token_id: token_id not in stops, ids))
