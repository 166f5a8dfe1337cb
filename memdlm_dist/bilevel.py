"""One micro-batch through the bi-level objective: trunk, inner loop, outer loss.

Training, validation and the golden checks all go through `outer_loss`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist import fast_weights, inner_loop
from memdlm_dist.diffusion import token_nll, weighted_nll
from memdlm_dist.fast_weights import AdaptedLinear, FastWeights
from memdlm_dist.inner_loop import InnerStatistics
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.trajectory import MicroBatch, Scored


@dataclass(frozen=True)
class Memory:
    """How the parametric memory is written: what is fast, and the inner optimiser."""

    first_layer: int
    linears: Sequence[AdaptedLinear]
    rank: int
    alpha: float
    learning_rate: float
    clip: float
    per_sample: bool
    tp_mesh: DeviceMesh | None = None

    def draw(self, seed: int, step: int, sample_ids_B: Tensor) -> FastWeights:
        """The fast weights with which a micro-batch starts."""
        keys_G = fast_weights.keys(seed, step, sample_ids_B, self.per_sample)
        return fast_weights.draw(self.linears, self.rank, self.alpha, keys_G, self.tp_mesh)


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
        logits_NV = model(anchor.tokens_BL, anchor.scored.index_SM[shard])
        return _loss_sum(logits_NV, anchor.scored), None

    assert fast is not None
    cut = memory.first_layer
    # The anchor's trunk goes first: some versions of torch leave the casts of a no_grad pass in
    # autocast's cache, and a pass that reuses those has no gradient.
    h_anchor = model.trunk(anchor.tokens_BL, cut)
    with torch.no_grad():
        # inner[-1] reads what the anchor reads: same activations, without their graph.
        hidden = [model.trunk(view.tokens_BL, cut) for view in batch.inner[:-1]]
    hidden.append(h_anchor.detach())

    def predict(k: int, current: FastWeights) -> Tensor:
        # Only the activations of the step at hand stay: popped, so that a long trajectory frees them.
        return model.tail(hidden.pop(0), cut, batch.inner[k].scored.index_SM[shard], current)

    fast, statistics = inner_loop.adapt(
        predict,
        [view.scored for view in batch.inner],
        fast,
        n_sets=len(batch.sample_ids_B) if memory.per_sample else 1,
        learning_rate=memory.learning_rate,
        clip=memory.clip,
    )
    if on_adapted is not None:
        on_adapted(fast)
    logits_NV = model.tail(h_anchor, cut, anchor.scored.index_SM[shard], fast)
    return _loss_sum(logits_NV, anchor.scored), statistics


def _loss_sum(logits_NV: Tensor, scored: Scored) -> Tensor:
    return weighted_nll(token_nll(logits_NV, scored.label_N), scored.weight_N, scored.valid_N).sum()
