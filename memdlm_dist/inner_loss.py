"""What the inner loop minimises at a scored token: a distance between a prediction and its target.

The target is the clean token, or what a teacher predicts there: the same model with the current fast
weights, without gradient, reading the next state of the trajectory (the clean sequence at the last).

Shapes: N scored tokens, V vocabulary, D model. Under tensor parallelism predictions are DTensors
sharded on their last dimension, or replicated local tensors; every distance takes both and returns
local tensors that are equal on all ranks.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.diffusion import token_nll

# What is read off the model: the output head's logits [N, V], or the last layer's output [N, D] before
# or after the final norm.
Hidden = Literal["pre_final_norm", "post_final_norm"]
Readout = Literal["logits"] | Hidden


class InnerLoss(NamedTuple):
    """An inner loss: `distance(student's prediction, target)` in float32 at least, `[N]`."""

    distance: Callable[[Tensor, Tensor], Tensor]
    student: Readout = "logits"
    teacher: Readout | None = None  # None: the target is the clean token


def kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S) in nats."""
    log_s, log_t = _log_probabilities(student_NV), _log_probabilities(teacher_NV)
    return _sum(log_t.exp() * (log_t - log_s))


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T) in nats."""
    return kl(teacher_NV, student_NV)


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared difference over the D hidden units."""
    return _sum((_float(student_ND) - _float(teacher_ND)).square()) / student_ND.shape[-1]


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine of the angle between the two hidden states."""
    s, t = _float(student_ND), _float(teacher_ND)
    s_inverse, t_inverse = (_sum(x.square()).clamp(min=1e-24).rsqrt() for x in (s, t))
    return 1 - _sum(s * t) * s_inverse * t_inverse


LOGIT_LOSSES = {
    "cross_entropy": InnerLoss(token_nll),
    "kl": InnerLoss(kl, "logits", "logits"),
    "reverse_kl": InnerLoss(reverse_kl, "logits", "logits"),
}
HIDDEN_LOSSES = {"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}
INNER_LOSSES = (*LOGIT_LOSSES, *HIDDEN_LOSSES)


def inner_loss(name: str, student_hidden: Hidden, teacher_hidden: Hidden) -> InnerLoss:
    """An inner loss by name.

    Args:
        name: one of `INNER_LOSSES`.
        student_hidden: which hidden state a hidden loss takes of the student.
        teacher_hidden: and of the teacher.
    """
    if name in HIDDEN_LOSSES:
        return InnerLoss(HIDDEN_LOSSES[name], student_hidden, teacher_hidden)
    return LOGIT_LOSSES[name]


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_probabilities(logits_NV: Tensor) -> Tensor:
    # Not log_softmax: inside torch's `loss_parallel` context its backward on a sharded vocabulary is
    # made for cross-entropy alone. These reductions move one number per token over the group.
    logits_NV = _float(logits_NV)
    shifted_NV = logits_NV - logits_NV.detach().amax(-1, keepdim=True)
    return shifted_NV - shifted_NV.exp().sum(-1, keepdim=True).log()


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, on every rank."""
    total = x.sum(-1)
    return total.full_tensor() if isinstance(total, DTensor) else total
