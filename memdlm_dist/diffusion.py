"""Masked diffusion: noise schedules, corruption and the loss that inner and outer loop share.

Shapes: B sequences, L tokens, N scored tokens, V vocabulary.
The forward process is absorbing: at level t every maskable token is `[MASK]` with probability
1 - alpha(t). The training objective is the negative ELBO of that process (MDLM), a weighted
cross-entropy of the masked tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

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


def token_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log p(label) in nats for every scored token `[N]`, computed in float32 at least.

    Under tensor parallelism the logits are a DTensor sharded on the vocabulary; inside torch's
    `loss_parallel` context no rank ever holds a whole row of them.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    return nll_N.to_local() if isinstance(nll_N, DTensor) else nll_N


def weighed(loss_N: Tensor, weight_N: Tensor, valid_N: Tensor) -> Tensor:
    """w l `[N]`, the terms of both loops' losses (their denominators differ); 0 on padding."""
    return torch.where(valid_N, weight_N * loss_N, 0.0)
