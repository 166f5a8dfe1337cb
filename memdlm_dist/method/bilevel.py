"""The bi-level objective on one micro-batch: shared trunk, inner loop, outer loss.

Inner loop, k = 0 .. K-1:  phi_{k+1} = phi_k - lr * clip(d L_inner(theta, phi_k; x_k) / d phi_k)
Outer loss:                sum over the anchor's masked tokens of -w(t) log p(x_0 | x_t; theta, phi_K)

theta are the base weights, phi the fast weights, x_k the state that inner step k reads, x_t the anchor. With several
inner epochs the loop goes through x_0 .. x_{K-1} again in order and goes on with the same phi. The outer loss treats
the last phi as a constant (first order), so only theta receives gradients. Training, validation and the golden checks
all call `outer_loss`.

Source: MemDLM, arXiv 2603.22241.

Shapes: B rows, L tokens, D model width, M scored tokens of one sequence shard, G sets of fast weights.
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
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy
from memdlm_dist.method.micro_batch import MicroBatch, Scored


class FSDPSchedule(Protocol):
    """FSDP2 unshard and reshard schedule of a backbone; see `models.fsdp_schedule`."""

    def tail(self, first_layer: int) -> AbstractContextManager[None]:
        """Keep the tail's parameters unsharded until the outer backward pass has used them."""
        ...


class Backbone(Protocol):
    """Backbone interface of the bi-level step; implemented by `models.llada.LLaDA`.

    `context` is an opaque value: only the backbone reads it.
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
        dropout: TermDropout = NO_DROPOUT,
    ) -> Any:
        """Build the per-token arguments of the layers for a micro-batch: positions, attention mask, sets, dropout.

        Args:
            length: L, tokens per row on this context-parallel rank.
            first: position of this rank's first token in the full row.
            attended_BL: bool, tokens of the full rows that attention may read; None for all.
            documents: documents of the full packed rows.
            per_document_sets: each document has its own set of fast weights.
            sequence_shard: (tp_rank, tp_size).
            dropout: dropout of the low-rank terms, for this context-parallel rank's tokens.
        """
        ...

    def __call__(
        self, tokens_BL: Tensor, index_M: Tensor, fast: FastWeights | None, readout: Any, context: Any
    ) -> Tensor:
        """Run the full model, and the head at positions `index_M` of this rank's flattened activations; see `tail`."""
        ...

    def trunk(self, inputs: Sequence[Tensor], stop: int, context: Any) -> list[Tensor]:
        """Run the embedding and layers `0 .. stop - 1` on several inputs; return activations `[B, L, D]` of each.

        Only the first input's activations carry a gradient.
        """
        ...

    def tail(
        self,
        h_BLD: Tensor,
        start: int,
        index_M: Tensor,
        fast: FastWeights | None,
        readout: Any,
        context: Any,
        outer: bool = False,
    ) -> Tensor:
        """Run layers `start .. n - 1` on the trunk's activations, then the head at positions `index_M`.

        Args:
            readout: a `HeadLoss`, for losses `[G]`; or "logits"; or a `Hidden`, for hidden states.
            outer: True in the pass of the outer loss, False in passes of the inner loop.
        """
        ...

    def inner_steps(self, start: int) -> AbstractContextManager[None]:
        """Freeze layers `start .. n - 1`, final norm and head in this context: only fast weights get gradients."""
        ...


@dataclass(frozen=True)
class Memory:
    """Settings of the parametric memory: adapted linears, inner loss and optimiser, and the ranks that share sets."""

    first_layer: int
    linears: Sequence[AdaptedLinear]
    fast_weight_type: str  # a key of `fast_weights.FAST_WEIGHT_TYPES`
    rank: int
    alpha: float
    loss: InnerLoss
    optimiser: InnerSGD
    per_sample: bool  # one set of fast weights per sample; False: one for the micro-batch
    inner_epochs: int = 1  # passes of the inner loop over the trajectory
    tp_mesh: DeviceMesh | None = None
    # The ranks of an expert-parallel group share one set. Each rank stores the fast weights of its local experts, and
    # those of all other linears.
    ep_mesh: DeviceMesh | None = None
    # The ranks of a context-parallel group hold slices of the same rows. Each rank stores all sets of these rows.
    cp_mesh: DeviceMesh | None = None

    @property
    def group(self) -> FastWeightGroup | None:
        """Ranks that share sets of fast weights, this rank included; None without sharing."""
        if self.cp_mesh is not None:
            return FastWeightGroup(self.cp_mesh.get_group(), shares_rows=True)
        if self.ep_mesh is None:
            return None
        experts = frozenset((linear.layer, linear.target) for linear in self.linears if linear.experts)
        return FastWeightGroup(self.ep_mesh.get_group(), shares_rows=False, experts=experts)

    def count_sets(self, batch: MicroBatch) -> int:
        """Return G, the number of sets of fast weights of a micro-batch."""
        return len(batch.sample_ids_U) if self.per_sample else 1

    def draw(self, seed: int, step: int, sample_ids_U: Tensor) -> FastWeights:
        """Draw the initial fast weights of a micro-batch."""
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
    """Compute the outer loss sum of a micro-batch, after the inner loop has adapted the fast weights.

    sum over the anchor's masked tokens of -w(t) log p(x_0 | x_t; theta, phi_K). The caller divides the sum; in
    training, by the number of labelled tokens in the global batch. Only the base weights receive gradients: phi_K is a
    constant (first order). Under context parallelism the sum covers this rank's tokens; the caller adds up losses and
    gradients over the group.

    Args:
        batch: micro-batch on the model's device.
        memory: None for plain masked diffusion.
        fast: initial fast weights, required with `memory`.
        tp_rank: this rank's tensor-parallel rank, which selects its sequence shard.
        on_adapted: called with the fast weights after the last inner step.

    Returns:
        The loss sum (scalar), and the statistics of the inner loop (None without memory).
    """
    anchor, index_M, context = batch.anchor, batch.anchor.index_SM[tp_rank], token_context(model, batch, memory)
    if memory is None:
        return model(batch.inputs[0], index_M, None, _outer_head(anchor), context).sum(), None

    assert fast is not None
    first_layer = memory.first_layer
    h_anchor, *others = model.trunk(batch.inputs, first_layer, context)
    # Inner steps that read the anchor reuse its activations, without the autograd graph.
    hidden = [h_anchor.detach(), *others]
    with model.fsdp_schedule.tail(first_layer):
        fast, statistics = _adapt(model, batch, memory, fast, hidden, tp_rank, context)
        # Free the other states' activations before the outer pass.
        hidden.clear()
        others.clear()
        if on_adapted is not None:
            on_adapted(fast)
        return model.tail(
            h_anchor, first_layer, index_M, fast, _outer_head(anchor), context, outer=True
        ).sum(), statistics


@torch.no_grad()
def adapt_fast_weights(
    model: Backbone, batch: MicroBatch, memory: Memory, fast: FastWeights, tp_rank: int = 0
) -> tuple[FastWeights, InnerStatistics]:
    """Run the inner loop without the outer loss, for inference; for the arguments see `outer_loss`.

    Returns:
        The adapted fast weights, and the statistics of the inner loop.
    """
    context = token_context(model, batch, memory)
    hidden = model.trunk(batch.inputs, memory.first_layer, context)
    with model.fsdp_schedule.tail(memory.first_layer):
        return _adapt(model, batch, memory, fast, hidden, tp_rank, context)


def token_context(model: Backbone, batch: MicroBatch, memory: Memory | None) -> Any:
    """Build the backbone's context of a micro-batch, once for all passes."""
    mesh = memory.tp_mesh if memory is not None else None
    return model.context(
        batch.inputs[0].shape[1],
        batch.first,
        batch.attended_BL,
        batch.documents,
        per_document_sets=memory is not None and memory.per_sample,
        sequence_shard=(mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1),
        dropout=batch.dropout,
    )


def _adapt(
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
            [step.scored for step in batch.inner] * memory.inner_epochs,
            fast,
            n_sets=memory.count_sets(batch),
            optimiser=memory.optimiser,
            group=memory.group,
        )


def _outer_head(anchor: Scored) -> HeadLoss:
    """Build the readout of the outer loss: the w(t)-weighted sum of the masked tokens' cross-entropies."""
    weight_N = torch.where(anchor.valid_N, anchor.weight_N, 0.0)
    return HeadLoss(cross_entropy, anchor.label_N, SetSum(weight_N, torch.zeros_like(anchor.sample_N), n_sets=1))


def _state_loss(
    model: Backbone, batch: MicroBatch, memory: Memory, hidden: Sequence[Tensor], tp_rank: int, context: Any
) -> Callable[[int, FastWeights, SetSum], Tensor]:
    """Build the inner loop's loss function of (inner step, fast weights, sums), given the trunk's activations.

    Inner step k reads state k modulo the number of states: later epochs read the same activations again.
    """
    loss, first_layer = memory.loss, memory.first_layer

    def state_loss(k: int, current: FastWeights, sums: SetSum) -> Tensor:
        step = batch.inner[k % len(batch.inner)]
        index_M = step.scored.index_SM[tp_rank]
        if loss.teacher is None:
            target = step.scored.label_N
        else:
            assert step.teacher is not None
            with _no_gradient():
                target = model.tail(hidden[step.teacher], first_layer, index_M, current, loss.teacher, context)
        if loss.logit_loss is not None:
            head = HeadLoss(loss.logit_loss, full_tensor(target), sums, loss.temperature)
            return model.tail(hidden[step.student], first_layer, index_M, current, head, context)
        assert loss.hidden_distance is not None
        student = model.tail(hidden[step.student], first_layer, index_M, current, loss.student, context)
        return sums(loss.hidden_distance(student, target))

    return state_loss


@contextmanager
def _no_gradient() -> Iterator[None]:
    """Disable gradients, and autocast's cache with them.

    Some versions of torch cache the casts of parameters that autocast makes under no_grad. A later pass with gradients
    would reuse these casts, and the parameters would get no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
