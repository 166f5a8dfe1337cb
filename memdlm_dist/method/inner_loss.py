"""Inner losses: the distance between a scored token's prediction and its target.

The target is the clean token, or a teacher's prediction. The teacher is the same model with the current fast weights,
without gradient. It reads the next state: after the last state, the clean sequence; in the `pre_anchor_only`
trajectory, the anchor.

The output head computes losses of logits (logit_loss.py). Losses of hidden states are computed here. Under tensor
parallelism hidden states are DTensors sharded on their last dimension, or replicated local tensors. The distances
accept both and return local tensors that are equal on all tensor-parallel ranks.

Shapes: N scored tokens, D model width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.method.logit_loss import LogitLoss, cross_entropy, kl, reverse_kl

# The last layer's output `[N, D]`, before or after the final norm.
Hidden = Literal["pre_final_norm", "post_final_norm"]

# (student's hidden state, teacher's hidden state) -> distance `[N]`, float32 or wider.
HiddenDistance = Callable[[Tensor, Tensor], Tensor]


class InnerLoss(NamedTuple):
    """An inner loss, either of logits or of hidden states; exactly one of the first two fields is set."""

    logit_loss: LogitLoss | None = None
    hidden_distance: HiddenDistance | None = None
    student: Hidden = "post_final_norm"
    # None: no teacher, the target is the clean token. In a loss of logits the head computes the teacher's logits from
    # the teacher's hidden states after the final norm.
    teacher: Hidden | None = None
    temperature: float = 1.0  # of the logits of student and teacher, see `HeadLoss`


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Compute the mean squared difference over the D hidden units, `[N]`."""
    return _sum((_float(student_ND) - _float(teacher_ND)).square()) / student_ND.shape[-1]


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Compute 1 - cosine similarity of the two hidden states, `[N]`."""
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


def inner_loss(name: str, student_hidden: Hidden, teacher_hidden: Hidden, temperature: float = 1.0) -> InnerLoss:
    """Return an inner loss by name.

    Args:
        name: one of `INNER_LOSSES`.
        student_hidden: hidden state of the student in a loss of hidden states.
        teacher_hidden: hidden state of the teacher in a loss of hidden states.
        temperature: distillation temperature of losses between the logits of student and teacher; ignored by others.
    """
    if name in HIDDEN_LOSSES:
        return InnerLoss(hidden_distance=HIDDEN_LOSSES[name], student=student_hidden, teacher=teacher_hidden)
    loss = LOGIT_LOSSES[name]
    return loss if loss.teacher is None else loss._replace(temperature=temperature)


def full_tensor(x: Tensor) -> Tensor:
    """All-gather a DTensor into a plain tensor; plain tensors are returned unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, across all ranks if it is sharded; return a plain tensor."""
    return full_tensor(x.sum(-1))
