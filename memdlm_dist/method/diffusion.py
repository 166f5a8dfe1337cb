"""Masked diffusion: noise schedules, loss weights, and the weighted sums of token losses.

The forward process is absorbing: at noise level t every maskable token is `[MASK]` with probability 1 - alpha(t). The
training objective is the negative ELBO of that process (MDLM): a weighted cross-entropy over the masked tokens.

Shapes: N scored tokens, G sets of fast weights.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LEVEL = 1e-3
_EPSILON = 1e-6


class Noise(NamedTuple):
    """Mask probability `1 - alpha(t)` and loss weight `-alpha'(t) / (1 - alpha(t) + 1e-6)` at noise level t.

    One function returns both, so that corruption and loss weight always follow the same schedule.
    """

    mask_probability: Tensor
    weight: Tensor


def _linear(t: Tensor) -> Noise:  # alpha(t) = 1 - t
    return Noise(t, 1 / (t + _EPSILON))


def _cosine(t: Tensor) -> Noise:  # alpha(t) = 1 - cos(pi/2 (1 - t))
    angle = math.pi / 2 * (1 - t)
    return Noise(torch.cos(angle), math.pi / 2 * torch.sin(angle) / (torch.cos(angle) + _EPSILON))


SCHEDULES = {"linear": _linear, "cosine": _cosine}
WEIGHTS = ("schedule", "uniform")


class LossNorm(NamedTuple):
    """Normalisation of the outer loss over the global batch.

    A sample is a row, or a document of a packed row. Samples without a maskable token do not count.
    """

    per_answer: bool  # divide the loss of each sample by its own number of maskable tokens
    counts_samples: bool  # divide the total by the number of samples; False: by the number of maskable tokens


# With N maskable tokens in U samples, n_u of them in sample u, and the loss sum l_u of a sample:
# token sum_u l_u / N, answer sum_u (l_u / n_u) / U (fine-tuning in LLaDA, arXiv 2502.09992), sequence sum_u l_u / U.
LOSS_NORMS = {
    "token": LossNorm(per_answer=False, counts_samples=False),
    "answer": LossNorm(per_answer=True, counts_samples=True),
    "sequence": LossNorm(per_answer=False, counts_samples=True),
}


def noise_at(t: Tensor, schedule: str = "linear", weight: str = "schedule") -> Noise:
    """Compute mask probability and loss weight at noise level `t` (any shape, values in (0, 1])."""
    noise = SCHEDULES[schedule](t)
    return noise if weight == "schedule" else noise._replace(weight=torch.ones_like(t))


def level_from_uniform(u: Tensor) -> Tensor:
    """Compute the noise level t = eps + (1 - eps) u, eps = 1e-3, which bounds the mask probability away from 0."""
    return SMALLEST_LEVEL + (1 - SMALLEST_LEVEL) * u


class SetSum(NamedTuple):
    """Weighted sum of token losses for every set of fast weights: sum over the set's tokens of c_i l_i.

    The outer loss is a single sum, with c = w. The inner loss has c = w / (number of the set's scored tokens).
    """

    coefficient_N: Tensor  # 0 on padding
    set_N: Tensor  # int64
    n_sets: int

    def __call__(self, loss_N: Tensor) -> Tensor:
        """Return the sums `[G]`. Padding adds nothing, even if its loss is not finite."""
        term_N = torch.where(self.coefficient_N != 0, self.coefficient_N * loss_N, 0.0)
        if self.n_sets == 1:
            return term_N.sum(0, keepdim=True)
        return term_N.new_zeros(self.n_sets).index_add(0, self.set_N, term_N)
