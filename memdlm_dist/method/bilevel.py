"""The bi-level objective on one micro-batch: shared trunk, inner loop, outer loss.

Inner loop, k = 0 .. K-1:  phi_{k+1} = phi_k - lr * clip(d L_inner(theta, phi_k; x_k) / d phi_k)
Outer loss:                sum over the anchor's masked tokens of -w(t) log p(x_0 | x_t; theta, phi_K)

theta are the base weights, phi the fast weights, x_k the state that inner step k reads, x_t the anchor. With several
inner epochs the loop goes through x_0 .. x_{K-1} again in order and goes on with the same phi. The outer loss treats
the last phi as a constant (first order), so only theta receives gradients. Training, validation and the golden checks
all call `outer_loss`.

Source: MemDLM, arXiv 2603.22241.

Shapes: B rows, C rows that the inner loop reads, L tokens, D model width, M scored tokens of one sequence shard,
G sets of fast weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from memdlm_dist.method import fast_weight_tree, fast_weights, inner_loop
from memdlm_dist.method.backbone_protocol import Backbone
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.fast_weights import AdaptedLinear, FastWeights
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.inner_loss import InnerLoss, full_tensor
from memdlm_dist.method.inner_sgd import FastWeightGroup, InnerSGD
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy, smoothed_cross_entropy
from memdlm_dist.method.micro_batch import InnerStep, MicroBatch, Scored
from memdlm_dist.method.sets import Sets
from memdlm_dist.method.trajectory import ANCHOR_INPUT


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
    samples_per_set: int | None  # consecutive samples that share a set, see `Sets`; None: all of the micro-batch
    inner_epochs: int = 1  # passes of the inner loop over the trajectory
    tp_mesh: DeviceMesh | None = None
    # The ranks of an expert-parallel group share one set if `samples_per_set` is None. Each rank stores its local
    # experts' terms of all sets in the group.
    ep_mesh: DeviceMesh | None = None
    # The ranks of a context-parallel group hold slices of the same rows. Each rank stores all sets of these rows.
    cp_mesh: DeviceMesh | None = None

    @property
    def group(self) -> FastWeightGroup | None:
        """Ranks that share sets of fast weights, this rank included; None without sharing."""
        if self.cp_mesh is not None:
            return FastWeightGroup(self.cp_mesh.get_group(), "rows")
        if self.ep_mesh is None:
            return None
        experts = frozenset((linear.layer, linear.target) for linear in self.linears if linear.experts)
        if self.samples_per_set is None:
            return FastWeightGroup(self.ep_mesh.get_group(), "sets", experts)
        return FastWeightGroup(self.ep_mesh.get_group(), "experts", experts) if experts else None

    def draw(self, seed: int, step: int, sample_ids_U: Tensor, slots: int = 1) -> FastWeights:
        """Draw the initial fast weights of a micro-batch.

        Args:
            sample_ids_U: global sample ids.
            slots: document slots of a row.
        """
        sets = Sets(len(sample_ids_U) // slots, slots, self.samples_per_set)
        return fast_weights.draw(
            self.fast_weight_type,
            self.linears,
            self.rank,
            self.alpha,
            fast_weights.keys(seed, step, sample_ids_U[sets.first_samples(sample_ids_U.device)]),
            self.tp_mesh,
            self.ep_mesh,
            shares_sets=self.samples_per_set is None,
        )


def outer_loss(
    model: Backbone,
    batch: MicroBatch,
    memory: Memory | None,
    fast: FastWeights | None = None,
    tp_rank: int = 0,
    on_adapted: Callable[[FastWeights], None] | None = None,
    measures: bool = False,
    label_smoothing: float = 0.0,
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
        measures: also measure -log p of the anchor's tokens in the passes that read the anchor, and before the first
            inner step, which takes one more pass through the tail unless that step reads the anchor itself
            (`InnerStatistics.anchor_nll`). `write_X2` is always measured, so that compiled blocks need no second graph.
        label_smoothing: smoothing of the labels in the outer loss, see `cross_entropy`; what is measured has none.

    Returns:
        The loss sum (scalar), and the statistics of the inner loop (None without memory, and without inner steps).
    """
    head, context = _outer_head(batch.anchor, label_smoothing), token_context(model, batch, memory)
    if memory is None:
        return model(batch.inputs[0], batch.anchor.index_SM[tp_rank], None, head, context).sum(), None

    has_inner_rows = batch.inner_rows_C is not None
    inner_context = token_context(model, batch, memory, inner=True) if has_inner_rows else context
    tail = _Tail(model, batch, memory, tp_rank, context, inner_context)
    h_anchor, *others = model.trunk(batch.inputs, memory.first_layer, context, inner_context)
    # FSDP2 gathers the tail in the same order on all ranks, also on those without an inner step.
    with model.fsdp_schedule.tail(memory.first_layer):
        if not batch.inner:
            return tail.outer(h_anchor, None, head).sum(), None
        assert fast is not None
        nll = {}
        if measures and not _reads_anchor(batch.inner[0], memory):
            nll["before"] = _nll_before(tail, fast, h_anchor, head)
        # Inner steps that read the anchor reuse its activations, without the autograd graph.
        hidden = [h_anchor.detach(), *others]
        if batch.inner_rows_C is not None:
            hidden[0] = hidden[0].index_select(0, batch.inner_rows_C)
        fast, statistics = _adapt(tail, fast, hidden, nll if measures else None)
        # Free the other states' activations before the outer pass.
        hidden.clear()
        others.clear()
        if on_adapted is not None:
            on_adapted(fast)
        fast, squares = fast_weight_tree.measuring(fast, memory.linears)
        loss = tail.outer(h_anchor, fast, head).sum()
    if measures:
        nll["after"] = _nll(head, batch.anchor, batch.adapted_U)
    return loss, replace(statistics, write_X2=torch.stack(squares), anchor_nll=nll)


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
        return _adapt(_Tail(model, batch, memory, tp_rank, context, context), fast, hidden)


def token_context(model: Backbone, batch: MicroBatch, memory: Memory | None, inner: bool = False) -> Any:
    """Build the backbone's context of a micro-batch, once for all passes.

    Args:
        inner: of the rows that the inner loop reads, `MicroBatch.inner_rows_C`.
    """
    mesh = memory.tp_mesh if memory is not None else None
    documents, dropout = batch.documents, batch.dropout
    if inner and (rows_C := batch.inner_rows_C) is not None:
        documents = documents.rows(rows_C) if documents is not None else None
        dropout = dropout.rows(rows_C)
    return model.context(
        batch.inputs[0].shape[1],
        batch.first,
        batch.attended_BL,
        documents,
        documents_per_set=memory.samples_per_set if memory is not None else None,
        sequence_shard=(mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1),
        dropout=dropout,
    )


@dataclass(frozen=True)
class _Tail:
    """Passes of a micro-batch through the tail on one rank."""

    model: Backbone
    batch: MicroBatch
    memory: Memory
    tp_rank: int
    context: Any  # of all rows
    inner_context: Any  # of the rows that the inner loop reads

    def outer(self, h_anchor: Tensor, fast: FastWeights | None, readout: Any) -> Tensor:
        """Return the readout's result on the anchor's scored tokens, in the outer pass."""
        return self._pass(h_anchor, self.batch.anchor, fast, readout, self.context, outer=True)

    def before(self, h_anchor: Tensor, fast: FastWeights, readout: Any) -> Tensor:
        """Return the readout's result on the anchor's scored tokens, in an additional pass before the inner loop."""
        return self._pass(h_anchor, self.batch.anchor, fast, readout, self.context)

    def inner(self, hidden: Tensor, scored: Scored, fast: FastWeights, readout: Any) -> Tensor:
        """Return the readout's result on the scored tokens of a state, in the inner loop."""
        return self._pass(hidden, scored, fast, readout, self.inner_context)

    def _pass(
        self, hidden: Tensor, scored: Scored, fast: FastWeights | None, readout: Any, context: Any, outer: bool = False
    ) -> Tensor:
        index_M = scored.index_SM[self.tp_rank]
        return self.model.tail(hidden, self.memory.first_layer, index_M, fast, readout, context, outer=outer)


def _adapt(
    tail: _Tail, fast: FastWeights, hidden: Sequence[Tensor], nll: dict[str, Tensor] | None = None
) -> tuple[FastWeights, InnerStatistics]:
    """Run the inner loop on the rows that it reads.

    Args:
        nll: gets the results of `_nll` for the steps that read the anchor; None: do not measure.
    """
    batch, memory = tail.batch, tail.memory
    sets, all_fast = batch.sets(memory.samples_per_set), fast
    set_C, n_sets = None, sets.count
    if batch.inner_rows_C is not None:
        set_C = sets.of_rows(batch.inner_rows_C)
        sets, fast = replace(sets, rows=len(batch.inner_rows_C)), fast_weight_tree.select(fast, set_C, n_sets)
    with tail.model.inner_steps(memory.first_layer):
        fast, statistics = inner_loop.adapt(
            _state_loss(tail, hidden, nll),
            [step.scored for step in batch.inner] * memory.inner_epochs,
            fast,
            sets,
            memory.optimiser,
            memory.group,
        )
    if set_C is not None:
        adapted, fast = fast, fast_weight_tree.map_leaves(torch.clone, all_fast)
        fast_weight_tree.replace_sets(fast, set_C, n_sets, adapted)
    return fast, statistics


def empty_statistics(
    steps: Sequence[InnerStep], memory: Memory, measures: bool, device: torch.device
) -> InnerStatistics:
    """Return the statistics of `outer_loss` for no sample at all.

    Args:
        steps: steps of the inner loop in one epoch.
        memory: settings of the memory.
        measures: see `outer_loss`.
        device: device of the result.
    """
    steps = [*steps] * memory.inner_epochs
    names = [f"step_{k + 1}" for k, step in enumerate(steps) if _reads_anchor(step, memory)]
    names = [*([] if "step_1" in names else ["before"]), *names, "after"]
    return replace(
        InnerStatistics.empty(len(steps), device),
        write_X2=torch.zeros(len(memory.linears), 2, device=device),
        anchor_nll={name: torch.zeros(2, device=device) for name in names} if measures else {},
    )


def _reads_anchor(step: InnerStep, memory: Memory) -> bool:
    """Return whether an inner step computes -log p of the anchor's tokens."""
    return step.student == ANCHOR_INPUT and memory.loss.logit_loss is cross_entropy


def _nll_before(tail: _Tail, fast: FastWeights, h_anchor: Tensor, head: HeadLoss) -> Tensor:
    """Measure -log p of the anchor's tokens with the initial fast weights, see `_nll`."""
    # The pass is an inner step without its backward pass: compiled blocks run the graph that they have.
    with tail.model.inner_steps(tail.memory.first_layer), torch.enable_grad():
        fast = fast_weight_tree.map_leaves(lambda x: x.detach().requires_grad_(), fast)
        tail.before(h_anchor.detach(), fast, head)
    return _nll(head, tail.batch.anchor, tail.batch.adapted_U)


def _nll(head: HeadLoss, scored: Scored, adapted_U: Tensor | None = None) -> Tensor:
    """Return the sum of -log p over the scored tokens of a pass, in nats, and their number, `[2]`.

    Args:
        head: cross-entropy readout of the pass.
        scored: its scored tokens.
        adapted_U: bool, samples to count; None for all.
    """
    counted_N = scored.valid_N if adapted_U is None else scored.valid_N & adapted_U[scored.sample_N]
    nll_N = torch.where(counted_N, head.token_losses(), 0.0)
    return torch.stack([nll_N.sum().float(), counted_N.sum().float()])


def _outer_head(anchor: Scored, label_smoothing: float) -> HeadLoss:
    """Build the readout of the outer loss: the w(t)-weighted sum of the masked tokens' cross-entropies."""
    weight_N = torch.where(anchor.valid_N, anchor.weight_N, 0.0)
    sums = SetSum(weight_N, torch.zeros_like(anchor.sample_N), n_sets=1)
    return HeadLoss(smoothed_cross_entropy(label_smoothing), anchor.label_N, sums)


def _state_loss(
    tail: _Tail, hidden: Sequence[Tensor], nll: dict[str, Tensor] | None
) -> Callable[[int, FastWeights, SetSum], Tensor]:
    """Build the inner loop's loss function of (inner step, fast weights, sums), given the trunk's activations.

    Inner step k reads state k modulo the number of states: later epochs read the same activations again.
    """
    loss = tail.memory.loss

    def state_loss(k: int, current: FastWeights, sums: SetSum) -> Tensor:
        step = tail.batch.inner[k % len(tail.batch.inner)]
        if loss.teacher is None:
            target = step.scored.label_N
        else:
            assert step.teacher is not None
            with _no_gradient():
                target = tail.inner(hidden[step.teacher], step.scored, current, loss.teacher)
        if loss.logit_loss is not None:
            head = HeadLoss(loss.logit_loss, full_tensor(target), sums, loss.temperature)
            loss_G = tail.inner(hidden[step.student], step.scored, current, head)
            if nll is not None and _reads_anchor(step, tail.memory):
                nll[f"step_{k + 1}"] = _nll(head, step.scored)
            return loss_G
        assert loss.hidden_distance is not None
        student = tail.inner(hidden[step.student], step.scored, current, loss.student)
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
