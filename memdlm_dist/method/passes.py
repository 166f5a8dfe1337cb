"""Number of forward and backward passes of a bi-level step, for estimates of FLOPs, traffic and memory."""

from functools import cache
from typing import NamedTuple

import torch

from memdlm_dist.method import trajectory
from memdlm_dist.method.micro_batch import InnerStep, MicroBatch, micro_batch
from memdlm_dist.method.trajectory import Plan

_TOKENS = 8  # length of the dummy row in `planned_passes`; any length gives the same counts


class Passes(NamedTuple):
    """Passes of one micro-batch: the outer pass and the inner steps."""

    inputs: int  # distinct inputs, the outer pass's included; the trunk reads each once
    inner_steps: int  # of all epochs; each is a forward and a backward pass of the tail
    teacher: int  # additional forward passes of the tail, by the teacher

    @property
    def tail_forward(self) -> int:
        """Forward passes of the tail: outer, inner and teacher."""
        return 1 + self.inner_steps + self.teacher

    @property
    def tail_backward(self) -> int:
        """Backward passes of the tail: outer and inner."""
        return 1 + self.inner_steps


def count_passes(batch: MicroBatch, inner_epochs: int = 1) -> Passes:
    """Count the passes of a micro-batch; every inner epoch takes all inner steps again, on the trunk's same outputs."""
    teacher = sum(step.teacher is not None for step in batch.inner)
    return Passes(len(batch.inputs), inner_epochs * len(batch.inner), inner_epochs * teacher)


def planned_passes(plan: Plan, with_teacher: bool, inner_epochs: int = 1) -> Passes:
    """Count the passes of a plan's micro-batches; the counts are equal for all of them."""
    return count_passes(_dummy_batch(plan, with_teacher), inner_epochs)


@cache
def planned_steps(plan: Plan) -> tuple[InnerStep, ...]:
    """Return the inner steps of a plan's micro-batches, with the scored tokens of a dummy row."""
    return _dummy_batch(plan, with_teacher=False).inner


def _dummy_batch(plan: Plan, with_teacher: bool) -> MicroBatch:
    ids_B = torch.zeros(1, dtype=torch.int64)
    maskable_BL = torch.ones(1, _TOKENS, dtype=torch.bool)
    draw = trajectory.draw(0, 0, ids_B, maskable_BL)
    anchor = trajectory.anchor_state(draw, plan.schedule, plan.loss_weight)
    tokens_BL = torch.zeros(1, _TOKENS, dtype=torch.int64)
    states = plan.states(draw, anchor)
    return micro_batch(tokens_BL, maskable_BL, ids_B, anchor, states, 0, with_teacher)
