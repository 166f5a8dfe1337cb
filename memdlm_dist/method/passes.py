"""The passes of a bi-level step, counted on a plan's own states: for FLOPs, traffic and memory estimates."""

from typing import NamedTuple

import torch

from memdlm_dist.method import trajectory
from memdlm_dist.method.micro_batch import MicroBatch, micro_batch
from memdlm_dist.method.trajectory import Plan

_TOKENS = 8  # of the row on which a plan is counted; any length makes the same passes


class Passes(NamedTuple):
    """Passes of one micro-batch: the outer one, and those of the inner loop."""

    inputs: int  # different inputs, which the trunk reads once each; the outer pass's is one of them
    inner_steps: int  # each a forward and a backward pass of the tail
    teacher: int  # further forward passes of the tail, which distil

    @property
    def tail_forward(self) -> int:
        return 1 + self.inner_steps + self.teacher

    @property
    def tail_backward(self) -> int:
        return 1 + self.inner_steps


def count_passes(batch: MicroBatch) -> Passes:
    """Count the passes of a micro-batch."""
    teacher = sum(step.teacher is not None for step in batch.inner)
    return Passes(len(batch.inputs), len(batch.inner), teacher)


def planned_passes(plan: Plan, with_teacher: bool) -> Passes:
    """Count the passes of any micro-batch of a plan; they depend on no value in it."""
    ids_B = torch.zeros(1, dtype=torch.int64)
    maskable_BL = torch.ones(1, _TOKENS, dtype=torch.bool)
    draw = trajectory.draw(0, 0, ids_B, maskable_BL)
    anchor = trajectory.anchor_state(draw, plan.schedule, plan.loss_weight)
    tokens_BL = torch.zeros(1, _TOKENS, dtype=torch.int64)
    return count_passes(micro_batch(tokens_BL, maskable_BL, ids_B, anchor, plan.states(draw, anchor), 0, with_teacher))
