"""What the inner loop minimises at a scored token: a distance between a prediction and its target.

The target is the clean token, or what a teacher predicts there: the same model with the current fast
weights, without gradient, reading the next state of the trajectory (the clean sequence at the last).

Shapes: N scored tokens, D model. Under tensor parallelism hidden states are DTensors sharded on their
last dimension, or replicated local tensors; the distances between them take both and return local tensors
that are equal on all ranks. Losses of logits are computed by the output head; see logit_loss.py.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.method.logit_loss import LogitLoss, cross_entropy, kl, reverse_kl

# The last layer's output [N, D] before or after the final norm.
Hidden = Literal["pre_final_norm", "post_final_norm"]

# (student's hidden state, teacher's) -> distance [N], in float32 at least.
HiddenDistance = Callable[[Tensor, Tensor], Tensor]


class InnerLoss(NamedTuple):
    """An inner loss: of logits, or of hidden states of the student and the teacher."""

    of_logits: LogitLoss | None = None
    of_hidden: HiddenDistance | None = None
    student: Hidden = "post_final_norm"
    # None: the target is the clean token. For a loss of logits the head makes those of what it reads, the
    # final-normed states.
    teacher: Hidden | None = None


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared difference over the D hidden units."""
    return _sum((_float(student_ND) - _float(teacher_ND)).square()) / student_ND.shape[-1]


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine of the angle between the two hidden states."""
    s, t = _float(student_ND), _float(teacher_ND)
    s_inverse, t_inverse = (_sum(x.square()).clamp(min=1e-24).rsqrt() for x in (s, t))
    return 1 - _sum(s * t) * s_inverse * t_inverse


LOGIT_LOSSES = {
    "cross_entropy": InnerLoss(cross_entropy),
    "kl": InnerLoss(kl, teacher="post_final_norm"),
    "reverse_kl": InnerLoss(reverse_kl, teacher="post_final_norm"),
}
HIDDEN_LOSSES: dict[str, HiddenDistance] = {"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine}
INNER_LOSSES = (*LOGIT_LOSSES, *HIDDEN_LOSSES)


def inner_loss(name: str, student_hidden: Hidden, teacher_hidden: Hidden) -> InnerLoss:
    """An inner loss by name.

    Args:
        name: one of `INNER_LOSSES`.
        student_hidden: which hidden state a hidden loss takes of the student.
        teacher_hidden: and of the teacher.
    """
    if name in HIDDEN_LOSSES:
        return InnerLoss(of_hidden=HIDDEN_LOSSES[name], student=student_hidden, teacher=teacher_hidden)
    return LOGIT_LOSSES[name]


def full_tensor(x: Tensor) -> Tensor:
    """A tensor on every rank, if it is spread over some."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, on every rank."""
    return full_tensor(x.sum(-1))
