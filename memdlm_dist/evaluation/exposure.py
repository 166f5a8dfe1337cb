"""Exposure bias: what it costs a model to read its own choices in place of the truth.

At a mask ratio r the static loss is the NLL of the response's masked tokens while the others show the truth; the
sequential one that of those which are still masked when the model has filled in the others itself, one at a step, the
most confident first. R_EB = L_seq / L_static (METHOD: arXiv 2603.22241).

What a model leaves masked longest are the tokens it finds hardest, which makes its sequential loss higher whatever it
reads. So a third loss is measured: at those very positions, with the truth in all others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm_dist.inference.sampler import Decoding
from memdlm_dist.inference.trained_model import ANCHOR_RATIO, TrainedModel
from memdlm_dist.method import trajectory
from memdlm_dist.method.trajectory import IGNORE_INDEX

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Row:
    """A prompt and its true response, as token ids."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Point:
    """Losses at one mask ratio, in nats per masked token.

    Attributes:
        static: random positions masked, the truth elsewhere.
        sequential: the positions that the model fills in last, its own choices elsewhere.
        same_positions: those positions, the truth elsewhere.
    """

    ratio: float
    tokens: int
    static: float
    sequential: float
    same_positions: float

    @property
    def exposure_bias(self) -> float:
        """R_EB."""
        return self.sequential / self.static

    @property
    def at_same_positions(self) -> float:
        """What of it is due to the model's own choices, not to where it leaves them out."""
        return self.sequential / self.same_positions


def split_response(tokens_L: Tensor, labels_L: Tensor, eos_id: int, prompt_share: float = 0.5) -> Row | None:
    """A sample of a data set as prompt and response up to end-of-text; None if it holds no response.

    Args:
        labels_L: -100 on the prompt. Where nothing is, as in packed text, the first `prompt_share` of the tokens
            is taken for the prompt.
    """
    is_prompt = labels_L == IGNORE_INDEX
    end = len(tokens_L)
    if not is_prompt.any():
        start = int(end * prompt_share)
    else:
        # A chat has several turns: the last response counts.
        start = int(is_prompt.nonzero().max()) + 1
        ends = (tokens_L[start:] == eos_id).nonzero()
        end = start + int(ends.min()) + 1 if len(ends) else end
    if end <= start:
        return None
    return Row(tokens_L[:start].tolist(), tokens_L[start:end].tolist())


def measure(
    model: TrainedModel,
    rows: Sequence[Row],
    memory: bool,
    ratios: Sequence[float] = RATIOS,
    batch_size: int = 16,
    anchor_ratio: float = ANCHOR_RATIO,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[Point]:
    """The losses of rows at every mask ratio; call on all ranks.

    The static masks are functions of a row's number alone: the same for every model and setting.

    Args:
        memory: write each prompt into fast weights first.
    """
    found = model.data_parallel.map_batches(
        rows,
        batch_size,
        lambda batch, ids: list(_losses(model, batch, ids, memory, ratios, anchor_ratio)),
        progress,
    )
    totals = torch.stack(found).sum(0)  # [ratios, 4]
    return [
        Point(ratio, int(total[-1]), *(total[:-1] / total[-1]).tolist())
        for ratio, total in zip(ratios, totals, strict=True)
    ]


def _losses(
    model: TrainedModel, rows: Sequence[Row], ids: Sequence[int], memory: bool, ratios: Sequence[float], anchor: float
) -> Tensor:
    """Sums of the NLL by ratio, and their number of tokens, `[B, ratios, 4]` in float64."""
    prompts = [row.prompt for row in rows]
    fast = model.adapt(prompts, anchor, ids).fast if memory else None
    start = model.canvas(prompts, [len(row.response) for row in rows], ids)
    hidden_BL = start.response_BL
    clean_BL = start.tokens_BL.clone()
    clean_BL[hidden_BL] = torch.tensor([token for row in rows for token in row.response])
    n_B = hidden_BL.sum(1)
    ratio_R = torch.tensor(ratios, dtype=torch.float64)
    count_BR = (n_B.unsqueeze(1) * ratio_R).round().long().clamp(min=1)
    sums_BR4 = torch.zeros(*count_BR.shape, 4, dtype=torch.float64)
    sums_BR4[..., 3] = count_BR

    def nll(tokens_BL: Tensor, target_BL: Tensor) -> Tensor:
        shown_BL = torch.where(target_BL, model.mask_id, tokens_BL)
        return model.nll(shown_BL, target_BL, clean_BL, start.attended_BL, fast)

    draw = trajectory.draw(0, 0, start.ids_B, hidden_BL)
    for r in range(len(ratios)):
        sums_BR4[:, r, 0] = nll(clean_BL, trajectory.smallest(draw.u_BL, hidden_BL, count_BR[:, r]))

    start = start._replace(open_BL=hidden_BL)  # [MASK] in a prompt stays what it is
    one_by_one = Decoding(block_size=start.tokens_BL.shape[1], stop_at_eos=False)
    for step in model.denoise(start, one_by_one, fast):
        left_B = step.open_BL.sum(1)
        own_B, true_B = nll(step.tokens_BL, step.open_BL), nll(clean_BL, step.open_BL)
        reached_BR = left_B.unsqueeze(1) == count_BR
        sums_BR4[..., 1] = torch.where(reached_BR, own_B.unsqueeze(1), sums_BR4[..., 1])
        sums_BR4[..., 2] = torch.where(reached_BR, true_B.unsqueeze(1), sums_BR4[..., 2])
    # A ratio that leaves every token masked is reached before the first step, where nothing has been read yet.
    everything_BR = count_BR == n_B.unsqueeze(1)
    all_B = nll(clean_BL, hidden_BL).unsqueeze(1)
    for i in (1, 2):
        sums_BR4[..., i] = torch.where(everything_BR, all_B, sums_BR4[..., i])
    return sums_BR4
