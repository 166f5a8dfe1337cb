"""Exposure bias: the increase of the loss when the model reads its own predictions instead of the true tokens.

R_EB = L_seq / L_static at each mask ratio (arXiv 2603.22241). Both losses are the NLL of masked response tokens:

- L_static: random positions are masked, all others hold the true tokens.
- L_seq: the model decodes the response, one token per step, most confident first, until the remaining share of masked
  tokens is the mask ratio. The decoded positions hold the model's predictions.

Decoding leaves the hardest tokens for last, which alone increases L_seq. A third loss separates this effect: the same
positions as for L_seq are masked, and all others hold the true tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import MemorySettings
from memdlm_dist.inference.sampler import Step
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import trajectory
from memdlm_dist.method.trajectory import IGNORE_INDEX

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """Prompt and true response, as token ids."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Point:
    """Losses at one mask ratio, in nats per masked token.

    Attributes:
        ratio: mask ratio.
        tokens: number of masked tokens, over all rows.
        static: L_static: random positions masked, true tokens elsewhere.
        sequential: L_seq: the positions that the model decodes last are masked, its predictions elsewhere.
        same_positions: the positions of `sequential` masked, true tokens elsewhere.
    """

    ratio: float
    tokens: int
    static: float
    sequential: float
    same_positions: float

    @property
    def exposure_bias(self) -> float:
        """R_EB = L_seq / L_static."""
        return self.sequential / self.static

    @property
    def at_same_positions(self) -> float:
        """Part of R_EB caused by the model's predictions, not by the choice of positions: L_seq / same_positions."""
        return self.sequential / self.same_positions


def split_response(tokens_L: Tensor, labels_L: Tensor, eos_id: int, prompt_share: float = 0.5) -> Row | None:
    """Split a data set's sample into prompt and response; the response ends with end-of-text.

    Args:
        tokens_L: token ids.
        labels_L: -100 on prompt tokens. A sample without prompt tokens is packed text; `prompt_share` splits it.
        eos_id: the end-of-text token.
        prompt_share: fraction of the tokens of packed text to use as the prompt; the rest is the response.

    Returns:
        The row; None if the sample has no response.
    """
    is_prompt = labels_L == IGNORE_INDEX
    end = len(tokens_L)
    if not is_prompt.any():
        start = int(end * prompt_share)
    else:
        # A chat has several responses: take the last one.
        start = int(is_prompt.nonzero().max()) + 1
        ends = (tokens_L[start:] == eos_id).nonzero()
        end = start + int(ends.min()) + 1 if len(ends) else end
    if end <= start:
        return None
    return Row(tokens_L[:start].tolist(), tokens_L[start:end].tolist())


def measure(
    model: TrainedModel,
    rows: Sequence[Row],
    memory: MemorySettings | None,
    ratios: Sequence[float] = RATIOS,
    batch_size: int = 16,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Point]:
    """Compute the losses at every mask ratio, averaged over the masked tokens of all rows; a collective call.

    The masks of L_static depend on the row's index only, so they are the same for every model and setting.

    Args:
        model: the model to measure.
        rows: prompts and responses.
        memory: settings with which fast weights are adapted to each prompt first; None: no memory.
        ratios: mask ratios.
        batch_size: rows per forward pass.
        progress: callback, called with the number of rows completed since its last call.

    Returns:
        One point per ratio.
    """
    sums = model.data_parallel.map_batches(
        rows,
        batch_size,
        lambda batch, ids: list(_losses(model, batch, ids, memory, ratios)),
        progress,
    )
    totals = torch.stack(sums).sum(0)  # [R, 4]
    return [
        Point(ratio, int(total[-1]), *(total[:-1] / total[-1]).tolist())
        for ratio, total in zip(ratios, totals, strict=True)
    ]


def _losses(
    model: TrainedModel,
    rows: Sequence[Row],
    ids: Sequence[int],
    memory: MemorySettings | None,
    ratios: Sequence[float],
) -> Tensor:
    """Return each row's sums at R mask ratios: NLL static, sequential and at the same positions; number of tokens.

    Returns:
        float64 `[B, R, 4]`.
    """
    prompts = [row.prompt for row in rows]
    fast = model.adapt(prompts, memory, ids).fast if memory else None
    start = model.canvas(prompts, [len(row.response) for row in rows], ids)
    response_BL = start.response_BL
    clean_BL = start.tokens_BL.clone()
    clean_BL[response_BL] = torch.tensor([token for row in rows for token in row.response])
    n_B = response_BL.sum(1)
    ratio_R = torch.tensor(ratios, dtype=torch.float64)
    count_BR = (n_B.unsqueeze(1) * ratio_R).round().long().clamp(min=1)
    sums_BR4 = torch.zeros(*count_BR.shape, 4, dtype=torch.float64)
    sums_BR4[..., 3] = count_BR

    def nll(tokens_BL: Tensor, target_BL: Tensor) -> Tensor:
        masked_BL = torch.where(target_BL, model.mask_id, tokens_BL)
        return model.nll(masked_BL, target_BL, clean_BL, start.attended_BL, fast)

    draw = trajectory.draw(0, 0, start.ids_B, response_BL)
    for r in range(len(ratios)):
        sums_BR4[:, r, 0] = nll(clean_BL, trajectory.smallest(draw.u_BL, response_BL, count_BR[:, r]))

    start = start._replace(open_BL=response_BL)  # a [MASK] token in a prompt is not decoded
    one_per_step = Decoding(block_size=start.tokens_BL.shape[1], stop_at_eos=False)
    for step in map(Step.to_host, model.denoise(start, one_per_step, fast)):
        remaining_B = step.open_BL.sum(1)
        predicted_B, true_B = nll(step.tokens_BL, step.open_BL), nll(clean_BL, step.open_BL)
        is_reached_BR = remaining_B.unsqueeze(1) == count_BR
        sums_BR4[..., 1] = torch.where(is_reached_BR, predicted_B.unsqueeze(1), sums_BR4[..., 1])
        sums_BR4[..., 2] = torch.where(is_reached_BR, true_B.unsqueeze(1), sums_BR4[..., 2])
    # The loop yields states after a step only. A count of all tokens is the state before the first step.
    all_masked_BR = count_BR == n_B.unsqueeze(1)
    all_masked_B1 = nll(clean_BL, response_BL).unsqueeze(1)
    for i in (1, 2):
        sums_BR4[..., i] = torch.where(all_masked_BR, all_masked_B1, sums_BR4[..., i])
    return sums_BR4
