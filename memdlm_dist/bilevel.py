"""One micro-batch through the bi-level objective: trunk, inner loop, outer loss.

Training, validation and the golden checks all go through `outer_loss`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist import fast_weights, inner_loop
from memdlm_dist.diffusion import token_nll, weighed
from memdlm_dist.fast_weights import AdaptedLinear, FastWeights, InnerSGD
from memdlm_dist.inner_loop import InnerStatistics
from memdlm_dist.inner_loss import InnerLoss
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.trajectory import InnerStep, MicroBatch, Scored


@dataclass(frozen=True)
class Memory:
    """How the parametric memory is written: what is fast, what the inner loop minimises, and how."""

    first_layer: int
    linears: Sequence[AdaptedLinear]
    adapter: str  # a key of `fast_weights.ADAPTERS`
    rank: int
    alpha: float
    loss: InnerLoss
    optimiser: InnerSGD
    per_sample: bool
    tp_mesh: DeviceMesh | None = None

    def draw(self, seed: int, step: int, sample_ids_B: Tensor) -> FastWeights:
        """The fast weights with which a micro-batch starts."""
        keys_G = fast_weights.keys(seed, step, sample_ids_B, self.per_sample)
        return fast_weights.draw(self.adapter, self.linears, self.rank, self.alpha, keys_G, self.tp_mesh)


def outer_loss(
    model: LLaDA,
    batch: MicroBatch,
    memory: Memory | None,
    fast: FastWeights | None = None,
    shard: int = 0,
    on_adapted: Callable[[FastWeights], None] | None = None,
) -> tuple[Tensor, InnerStatistics | None]:
    """Sum of w(t) nll over the anchor's masked tokens, conditioned on the memory if there is one.

    The caller divides by the maskable tokens of the global batch. Gradients reach the base weights
    alone: the fast weights are constants to the outer loss (first order).

    Args:
        batch: on the model's device.
        memory: None for plain masked diffusion.
        fast: the initial fast weights, required with `memory`.
        shard: this rank's place in the tensor-parallel group, whose sequence shard it holds.
        on_adapted: called with the fast weights after the last inner step.

    Returns:
        The loss sum, a scalar, and the inner loop's statistics.
    """
    anchor = batch.anchor
    if memory is None:
        return _loss_sum(model(batch.inputs[0], anchor.index_SM[shard]), anchor), None

    assert fast is not None
    cut = memory.first_layer
    # The anchor's trunk goes first: some versions of torch leave the casts of a no_grad pass in
    # autocast's cache, and a pass that reuses those has no gradient.
    h_anchor = model.trunk(batch.inputs[0], cut)
    with torch.no_grad():
        # Inner steps that read the anchor take the same activations, without their graph.
        hidden = [h_anchor.detach(), *(model.trunk(tokens_BL, cut) for tokens_BL in batch.inputs[1:])]
    fast, statistics = inner_loop.adapt(
        _token_loss(model, batch.inner, memory, hidden, shard),
        [step.scored for step in batch.inner],
        fast,
        n_sets=len(batch.sample_ids_B) if memory.per_sample else 1,
        optimiser=memory.optimiser,
    )
    # The activations of the other states are not needed again: free them before the outer tail.
    hidden.clear()
    if on_adapted is not None:
        on_adapted(fast)
    return _loss_sum(model.tail(h_anchor, cut, anchor.index_SM[shard], fast), anchor), statistics


def _token_loss(
    model: LLaDA, steps: Sequence[InnerStep], memory: Memory, hidden: Sequence[Tensor], shard: int
) -> Callable[[int, FastWeights], Tensor]:
    """The inner loop's loss as a function of the step and the fast weights, on the trunk's activations."""
    loss, cut = memory.loss, memory.first_layer

    def token_loss(k: int, current: FastWeights) -> Tensor:
        step = steps[k]
        index_M = step.scored.index_SM[shard]
        # The student goes before the teacher for the sake of autocast's cache, as above.
        student = model.tail(hidden[step.student], cut, index_M, current, loss.student)
        if loss.teacher is None:
            return loss.distance(student, step.scored.label_N)
        assert step.teacher is not None
        with torch.no_grad():
            teacher = model.tail(hidden[step.teacher], cut, index_M, current, loss.teacher)
        return loss.distance(student, teacher)

    return token_loss


def _loss_sum(logits_NV: Tensor, scored: Scored) -> Tensor:
    return weighed(token_nll(logits_NV, scored.label_N), scored.weight_N, scored.valid_N).sum()
