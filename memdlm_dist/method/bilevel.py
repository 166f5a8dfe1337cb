"""One micro-batch through the bi-level objective: trunk, inner loop, outer loss.

Training, validation and the golden checks all go through `outer_loss`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist.method import fast_weights, inner_loop
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.fast_weights import AdaptedLinear, FastWeights
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.inner_loss import InnerLoss, full_tensor
from memdlm_dist.method.inner_sgd import FastWeightGroup, InnerSGD
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.method.micro_batch import MicroBatch, Scored


class FSDPSchedule(Protocol):
    """When the parameters of a backbone are gathered; see `models.fsdp_schedule`."""

    def tail(self, first_layer: int) -> AbstractContextManager[None]: ...


class Backbone(Protocol):
    """What the bi-level step asks of a backbone; see `models.llada.LLaDA` for what each does.

    A context is the backbone's own description of a micro-batch's tokens: opaque here.
    """

    fsdp_schedule: FSDPSchedule

    def context(
        self,
        length: int,
        first: int = 0,
        attended_BL: Tensor | None = None,
        documents: Documents | None = None,
        per_document_sets: bool = False,
        sequence_shard: tuple[int, int] = (0, 1),
    ) -> Any: ...

    def __call__(
        self, tokens_BL: Tensor, index_M: Tensor, fast: FastWeights | None, readout: Any, context: Any
    ) -> Tensor: ...

    def trunk(self, inputs: Sequence[Tensor], stop: int, context: Any) -> list[Tensor]: ...

    def tail(
        self,
        h_BLD: Tensor,
        start: int,
        index_M: Tensor,
        fast: FastWeights | None,
        readout: Any,
        context: Any,
        outer: bool = False,
    ) -> Tensor: ...

    def inner_steps(self, start: int) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Memory:
    """How the parametric memory is written: what is fast, what the inner loop minimises, and how."""

    first_layer: int
    linears: Sequence[AdaptedLinear]
    fast_weight_type: str  # a key of `fast_weights.FAST_WEIGHT_TYPES`
    rank: int
    alpha: float
    loss: InnerLoss
    optimiser: InnerSGD
    per_sample: bool
    tp_mesh: DeviceMesh | None = None
    # Expert parallelism: the ranks of a group have one set together, of which each keeps its own experts' terms.
    ep_mesh: DeviceMesh | None = None
    # Context parallelism: the ranks of a group have the sets of their rows together, each the whole of them.
    cp_mesh: DeviceMesh | None = None

    @property
    def group(self) -> FastWeightGroup | None:
        """The ranks that have their sets together."""
        if self.cp_mesh is not None:
            return FastWeightGroup(self.cp_mesh.get_group(), whole_sets=True)
        return FastWeightGroup(self.ep_mesh.get_group(), whole_sets=False) if self.ep_mesh is not None else None

    def sets(self, batch: MicroBatch) -> int:
        """The number of a micro-batch's sets of fast weights."""
        return len(batch.sample_ids_U) if self.per_sample else 1

    def draw(self, seed: int, step: int, sample_ids_U: Tensor) -> FastWeights:
        """The fast weights with which a micro-batch starts."""
        keys_G = fast_weights.keys(seed, step, sample_ids_U, self.per_sample)
        return fast_weights.draw(
            self.fast_weight_type, self.linears, self.rank, self.alpha, keys_G, self.tp_mesh, self.ep_mesh
        )


def outer_loss(
    model: Backbone,
    batch: MicroBatch,
    memory: Memory | None,
    fast: FastWeights | None = None,
    tp_rank: int = 0,
    on_adapted: Callable[[FastWeights], None] | None = None,
) -> tuple[Tensor, InnerStatistics | None]:
    """Sum of w(t) nll over the anchor's masked tokens, conditioned on the memory if there is one.

    Under context parallelism it is the sum over this rank's tokens, whose gradients add up over the group. The caller
    divides by the maskable tokens of the global batch. Gradients reach the base weights
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
    anchor, index_M, context = batch.anchor, batch.anchor.index_SM[tp_rank], token_context(model, batch, memory)
    if memory is None:
        return model(batch.inputs[0], index_M, None, _outer_head(anchor), context).sum(), None

    assert fast is not None
    cut = memory.first_layer
    h_anchor, *others = model.trunk(batch.inputs, cut, context)
    # Inner steps that read the anchor take the same activations, without their graph.
    hidden = [h_anchor.detach(), *others]
    with model.fsdp_schedule.tail(cut):
        fast, statistics = _write(model, batch, memory, fast, hidden, tp_rank, context)
        # The activations of the other states are not needed again: free them before the outer tail.
        hidden.clear()
        others.clear()
        if on_adapted is not None:
            on_adapted(fast)
        return model.tail(h_anchor, cut, index_M, fast, _outer_head(anchor), context, outer=True).sum(), statistics


@torch.no_grad()
def adapt_fast_weights(
    model: Backbone, batch: MicroBatch, memory: Memory, fast: FastWeights, tp_rank: int = 0
) -> tuple[FastWeights, InnerStatistics]:
    """The inner loop alone: what a micro-batch's trajectory writes, to read with; the arguments are `outer_loss`'s."""
    context = token_context(model, batch, memory)
    hidden = model.trunk(batch.inputs, memory.first_layer, context)
    with model.fsdp_schedule.tail(memory.first_layer):
        return _write(model, batch, memory, fast, hidden, tp_rank, context)


def token_context(model: Backbone, batch: MicroBatch, memory: Memory | None) -> Any:
    """What the layers are told of a micro-batch's tokens, made once for all passes."""
    mesh = memory.tp_mesh if memory is not None else None
    return model.context(
        batch.inputs[0].shape[1],
        batch.first,
        batch.attended_BL,
        batch.documents,
        per_document_sets=memory is not None and memory.per_sample,
        sequence_shard=(mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1),
    )


def _write(
    model: Backbone,
    batch: MicroBatch,
    memory: Memory,
    fast: FastWeights,
    hidden: Sequence[Tensor],
    tp_rank: int,
    context: Any,
) -> tuple[FastWeights, InnerStatistics]:
    with model.inner_steps(memory.first_layer):
        return inner_loop.adapt(
            _state_loss(model, batch, memory, hidden, tp_rank, context),
            [step.scored for step in batch.inner],
            fast,
            n_sets=memory.sets(batch),
            optimiser=memory.optimiser,
            group=memory.group,
        )


def _outer_head(anchor: Scored) -> HeadLoss:
    """Sum of w(t) nll over the anchor's masked tokens."""
    weight_N = torch.where(anchor.valid_N, anchor.weight_N, 0.0)
    return HeadLoss(cross_entropy, anchor.label_N, SetSum(weight_N, torch.zeros_like(anchor.sample_N), n_sets=1))


def _state_loss(
    model: Backbone, batch: MicroBatch, memory: Memory, hidden: Sequence[Tensor], tp_rank: int, context: Any
) -> Callable[[int, FastWeights, SetSum], Tensor]:
    """The inner loop's loss as a function of the step and the fast weights, on the trunk's activations."""
    loss, cut = memory.loss, memory.first_layer

    def state_loss(k: int, current: FastWeights, sums: SetSum) -> Tensor:
        step = batch.inner[k]
        index_M = step.scored.index_SM[tp_rank]
        if loss.teacher is None:
            target = step.scored.label_N
        else:
            assert step.teacher is not None
            with _no_gradient():
                target = model.tail(hidden[step.teacher], cut, index_M, current, loss.teacher, context)
        if loss.of_logits is not None:
            head = HeadLoss(loss.of_logits, full_tensor(target), sums)
            return model.tail(hidden[step.student], cut, index_M, current, head, context)
        assert loss.of_hidden is not None
        student = model.tail(hidden[step.student], cut, index_M, current, loss.student, context)
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
