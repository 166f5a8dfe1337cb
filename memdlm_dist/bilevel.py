"""One micro-batch through the bi-level objective: trunk, inner loop, outer loss.

Training, validation and the golden checks all go through `outer_loss`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist import fast_weights, inner_loop
from memdlm_dist.diffusion import SetSum
from memdlm_dist.fast_weights import AdaptedLinear, FastWeights, InnerSGD
from memdlm_dist.inner_loop import InnerStatistics
from memdlm_dist.inner_loss import InnerLoss, whole
from memdlm_dist.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.trajectory import MicroBatch, Scored


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
    # Expert parallelism: the ranks of a group have one set together, of which each keeps its own experts' terms.
    ep_mesh: DeviceMesh | None = None

    def draw(self, seed: int, step: int, sample_ids_B: Tensor) -> FastWeights:
        """The fast weights with which a micro-batch starts."""
        keys_G = fast_weights.keys(seed, step, sample_ids_B, self.per_sample)
        return fast_weights.draw(self.adapter, self.linears, self.rank, self.alpha, keys_G, self.tp_mesh, self.ep_mesh)


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
    anchor, index_M, attended_BL = batch.anchor, batch.anchor.index_SM[shard], batch.attended_BL
    if memory is None:
        return model(batch.inputs[0], index_M, None, _outer_head(anchor), attended_BL).sum(), None

    assert fast is not None
    cut = memory.first_layer
    h_anchor, *others = model.trunk(batch.inputs, cut, attended_BL)
    # Inner steps that read the anchor take the same activations, without their graph.
    hidden = [h_anchor.detach(), *others]
    with model.residency.tail(cut):
        fast, statistics = _write(model, batch, memory, fast, hidden, shard)
        # The activations of the other states are not needed again: free them before the outer tail.
        hidden.clear()
        others.clear()
        if on_adapted is not None:
            on_adapted(fast)
        return model.tail(h_anchor, cut, index_M, fast, _outer_head(anchor), attended_BL).sum(), statistics


@torch.no_grad()
def remember(
    model: LLaDA, batch: MicroBatch, memory: Memory, fast: FastWeights, shard: int = 0
) -> tuple[FastWeights, InnerStatistics]:
    """The inner loop alone: what a micro-batch's trajectory writes, to read with; the arguments are `outer_loss`'s."""
    hidden = model.trunk(batch.inputs, memory.first_layer, batch.attended_BL)
    with model.residency.tail(memory.first_layer):
        return _write(model, batch, memory, fast, hidden, shard)


def _write(
    model: LLaDA, batch: MicroBatch, memory: Memory, fast: FastWeights, hidden: Sequence[Tensor], shard: int
) -> tuple[FastWeights, InnerStatistics]:
    with model.residency.inner_steps(memory.first_layer):
        return inner_loop.adapt(
            _state_loss(model, batch, memory, hidden, shard),
            [step.scored for step in batch.inner],
            fast,
            n_sets=len(batch.sample_ids_B) if memory.per_sample else 1,
            optimiser=memory.optimiser,
            pool=memory.ep_mesh.get_group() if memory.ep_mesh is not None else None,
        )


def _outer_head(anchor: Scored) -> HeadLoss:
    """Sum of w(t) nll over the anchor's masked tokens."""
    weight_N = torch.where(anchor.valid_N, anchor.weight_N, 0.0)
    return HeadLoss(cross_entropy, anchor.label_N, SetSum(weight_N, torch.zeros_like(anchor.row_N), n_sets=1))


def _state_loss(
    model: LLaDA, batch: MicroBatch, memory: Memory, hidden: Sequence[Tensor], shard: int
) -> Callable[[int, FastWeights, SetSum], Tensor]:
    """The inner loop's loss as a function of the step and the fast weights, on the trunk's activations."""
    loss, cut, attended_BL = memory.loss, memory.first_layer, batch.attended_BL

    def state_loss(k: int, current: FastWeights, sums: SetSum) -> Tensor:
        step = batch.inner[k]
        index_M = step.scored.index_SM[shard]
        if loss.teacher is None:
            target = step.scored.label_N
        else:
            assert step.teacher is not None
            with _no_gradient():
                target = model.tail(hidden[step.teacher], cut, index_M, current, loss.teacher, attended_BL)
        if loss.of_logits is not None:
            head = HeadLoss(loss.of_logits, whole(target), sums, train_head=False)
            return model.tail(hidden[step.student], cut, index_M, current, head, attended_BL)
        assert loss.of_hidden is not None
        student = model.tail(hidden[step.student], cut, index_M, current, loss.student, attended_BL)
        return sums(loss.of_hidden(student, target))

    return state_loss


@contextmanager
def _no_gradient() -> Iterator[None]:
    """no_grad that leaves nothing in autocast's cache.

    Some versions of torch keep there the casts that are made under no_grad, and a later pass that takes
    them has no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
