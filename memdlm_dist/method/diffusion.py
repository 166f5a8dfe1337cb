"""Masked diffusion: noise schedules, loss weights, and how tokens' losses add up in inner and outer loop.

Shapes: B sequences, L tokens, N scored tokens, G sets of fast weights.
The forward process is absorbing: at level t every maskable token is `[MASK]` with probability
1 - alpha(t). The training objective is the negative ELBO of that process (MDLM), a weighted
cross-entropy of the masked tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LEVEL = 1e-3
_EPSILON = 1e-6


class Noise(NamedTuple):
    """Mask probability `1 - alpha(t)` and loss weight `-alpha'(t) / (1 - alpha(t) + 1e-6)` at one t.

    Both come from one call, so that a schedule cannot corrupt by one curve and weigh by another.
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


def noise_at(t: Tensor, schedule: str = "linear", weight: str = "schedule") -> Noise:
    """Mask probability and loss weight at noise level `t` (any shape, values in (0, 1])."""
    noise = SCHEDULES[schedule](t)
    return noise if weight == "schedule" else noise._replace(weight=torch.ones_like(t))


def level_from_uniform(u: Tensor) -> Tensor:
    """Noise level t = eps + (1 - eps) u with eps = 1e-3: never so small that nothing can be masked."""
    return SMALLEST_LEVEL + (1 - SMALLEST_LEVEL) * u


class SetSum(NamedTuple):
    """Adds tokens' losses up to one loss for every set: sum over the set's tokens of c_i l_i.

    Both loops' losses are such sums. The outer one has one set and c = w; the inner one divides by the
    set's number of scored tokens.
    """

    coefficient_N: Tensor  # 0 on padding
    set_N: Tensor  # int64
    n_sets: int

    def __call__(self, loss_N: Tensor) -> Tensor:
        """`[G]`. Padding counts for nothing, also where its loss is not finite."""
        term_N = torch.where(self.coefficient_N != 0, self.coefficient_N * loss_N, 0.0)
        if self.n_sets == 1:
            return term_N.sum(0, keepdim=True)
        return term_N.new_zeros(self.n_sets).index_add(0, self.set_N, term_N)
