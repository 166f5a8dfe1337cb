"""Canvas of decoding: prompts of any length, [MASK]s for their responses, and padding.

Shapes: B sequences, L tokens.
"""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.errors import UserError

# Upper limit of a canvas's length: the random key of a token is its row's id times this plus its position.
MAX_LENGTH = 2**24


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

    Raises:
        UserError: if a row is too long.
    """
    counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
    ends = torch.tensor([len(prompt) + count for prompt, count in zip(prompts, counts, strict=True)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    length = max(1, int(ends.max()))
    length += -length % multiple
    if length >= MAX_LENGTH:
        raise UserError(f"A prompt with its response has {length:,} tokens, more than {MAX_LENGTH - 1:,}; shorten it.")
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


def responses(tokens_BL: Tensor, start: Canvas, eos_id: int) -> list[list[int]]:
    """Return the token ids of each row's response, up to end-of-text."""
    rows = [tokens[response].tolist() for tokens, response in zip(tokens_BL, start.response_BL, strict=True)]
    return [until(row, {eos_id}) for row in rows]


def until(ids: Sequence[int], stops: Collection[int | None]) -> list[int]:
    """Return the token ids before the first one in `stops`."""
    return list(takewhile(lambda token_id: token_id not in stops, ids))
