"""Objective of a configuration: draws the noise of a micro-batch and computes its loss.

This is the only module that knows all three: configuration, parallel layout and mathematics (`method/`). Training,
validation and inference share it.

Shapes: B rows, C rows that the inner loop reads, L tokens, U samples (rows, or documents of packed rows), G sets of
fast weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memdlm_dist.config.job_config import JobConfig, ParametricMemory
from memdlm_dist.method import keyed_random, trajectory
from memdlm_dist.method.bilevel import Memory, empty_statistics, outer_loss
from memdlm_dist.method.diffusion import LOSS_NORMS
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.inner_loss import InnerLoss, inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.keyed_dropout import Dropout, TermDropout
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.method.micro_batch import MicroBatch, micro_batch
from memdlm_dist.method.passes import planned_steps
from memdlm_dist.method.sets import Sets
from memdlm_dist.method.trajectory import IGNORE_INDEX, Draw, Plan, State
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA, LLaDAArgs


@dataclass(frozen=True)
class Objective:
    """Masked-diffusion objective on this rank, with a parametric memory or without (`memory=None`)."""

    mask_token_id: int
    plan: Plan
    memory: Memory | None
    seed: int
    tp_size: int
    tp_rank: int
    probability: float = 1.0  # share of the samples, or of the steps, that train with the memory
    probability_unit: str = "sample"  # "step": all samples of a step train with the memory, or none
    start_step: int = 1  # first step that may train with the memory
    adapter_dropout: float = 0.0  # probability of dropping an input feature of an outer adapter
    fast_weight_dropout: float = 0.0  # probability of dropping an input feature of a fast weight's term
    shifted: bool = False  # the backbone predicts the next token
    cp_size: int = 1
    cp_rank: int = 0
    loss_norm: str = "token"  # a key of `LOSS_NORMS`; the sum of `loss_sum` is over tokens weighted accordingly
    label_smoothing: float = 0.0  # of the outer loss, see `cross_entropy`
    slots: int | None = (
        None  # document slots per packed row; None: chosen per micro-batch, see `Documents.from_numbers`
    )

    def at_step(self, step: int) -> "Objective":
        """Return the objective of a training step, equal on all ranks: plain masked diffusion, or with the memory."""
        if self.memory is None:
            return self
        if step < self.start_step:
            return replace(self, memory=None)
        if not self.by_step:
            return self
        chosen = self._draw_memory(step, torch.zeros(1, dtype=torch.int64)).item()
        return replace(self, probability=1.0) if chosen else replace(self, memory=None)

    @property
    def by_step(self) -> bool:
        """True if all samples of a step train with the memory, or none."""
        return self.probability_unit == "step" or (self.memory is not None and self.memory.samples_per_set is None)

    def _draw_memory(self, step: int, ids: Tensor) -> Tensor:
        """Draw for each id whether it trains with the memory, bool."""
        u = keyed_random.uniform(keyed_random.key(self.seed, Stream.MEMORY, step, ids), torch.zeros(1).long())
        return u.squeeze(1) < self.probability

    def micro_batch(
        self,
        tokens_BL: Tensor,
        labels_BL: Tensor,
        sample_ids_B: Tensor,
        step: int,
        t_U: Tensor | None = None,
        outer_weight: str | None = None,
        documents_BL: Tensor | None = None,
        adapted_groups: int | None = None,
    ) -> MicroBatch:
        """Draw the noise of a micro-batch, on the host.

        Under context parallelism the arguments hold whole rows and the result holds this rank's sequence shard.

        Args:
            tokens_BL: clean tokens.
            labels_BL: the clean token where it may be masked, -100 elsewhere.
            sample_ids_B: global ids of the rows, which key the noise.
            step: training step; 0 for noise that never changes.
            t_U: noise levels of the samples; drawn if None.
            outer_weight: loss weight of the outer loss; the plan's if None.
            documents_BL: document number of each token of packed rows (`Documents.number_BL`); the documents are then
                the samples.
            adapted_groups: number of groups of rows with common sets of fast weights, from the first, that train with
                the memory; drawn with `probability` if None.
        """
        documents = Documents.from_numbers(documents_BL, self.slots) if documents_BL is not None else None
        sample_ids_U = sample_ids_B if documents is None else documents.ids(sample_ids_B)
        maskable_BL = labels_BL != IGNORE_INDEX
        if self.shifted:  # no position predicts the first token
            first_BL = torch.arange(tokens_BL.shape[1]) == 0 if documents is None else documents.position_BL == 0
            maskable_BL &= ~first_BL
        draw = trajectory.draw(self.seed, step, sample_ids_U, maskable_BL, t_U, documents)
        anchor = trajectory.anchor_state(draw, self.plan.schedule, outer_weight or self.plan.loss_weight)
        outer = anchor
        if LOSS_NORMS[self.loss_norm].per_answer:
            n_U = draw.count_per_sample(maskable_BL).clamp(min=1)
            outer = replace(anchor, weight_U=anchor.weight_U / n_U)
        states, inner_rows_C, adapted_U = self._inner_states(draw, anchor, step, sample_ids_U, adapted_groups)
        return micro_batch(
            tokens_BL,
            maskable_BL,
            sample_ids_U,
            outer,
            states,
            mask_token_id=self.mask_token_id,
            with_teacher=self.memory is not None and self.memory.loss.teacher is not None,
            sequence_shards=self.cp_size * self.tp_size,
            shifted=self.shifted,
            documents=documents,
            dropout=self._dropout(step, sample_ids_U, tokens_BL.shape[1], documents),
            inner_rows_C=inner_rows_C,
            adapted_U=adapted_U,
        ).cp_slice(self.cp_rank, self.cp_size)

    def _dropout(self, step: int, sample_ids_U: Tensor, length: int, documents: Documents | None) -> TermDropout:
        """Draw the keys of the dropout masks of a step."""

        def draw(stream: Stream, probability: float) -> Dropout | None:
            return Dropout.draw(self.seed, stream, step, sample_ids_U, length, documents, probability)

        return TermDropout(
            draw(Stream.ADAPTER_DROPOUT, self.adapter_dropout),
            draw(Stream.FAST_WEIGHT_DROPOUT, self.fast_weight_dropout) if self.memory is not None else None,
        )

    def held_out(self) -> "Objective":
        """Return the objective of held-out losses per token.

        It has noise of seed 0, memory for all samples, no dropout, and labels that are not smoothed.
        """
        plain = replace(self, adapter_dropout=0.0, fast_weight_dropout=0.0, label_smoothing=0.0)
        return replace(plain, seed=0, probability=1.0, loss_norm="token")

    def _inner_states(
        self, draw: Draw, anchor: State, step: int, sample_ids_U: Tensor, adapted_groups: int | None
    ) -> tuple[list[State], Tensor | None, Tensor | None]:
        """Return the plan's states, the rows that they cover, and the samples that train with the memory.

        None stands for all rows and for all samples. Samples that share a set of fast weights share the draw. The
        number of rows is one of `row_counts`; rows beyond those with a chosen sample have no targets, and leave their
        fast weights unchanged.
        """
        if self.memory is None:
            return [], None, None
        if self.probability == 1 and adapted_groups is None:
            return self.plan.states(draw, anchor), None, None
        rows, slots = len(draw.maskable_BL), draw.documents.slots if draw.documents is not None else 1
        sets, device = Sets(rows, slots, self.memory.samples_per_set), sample_ids_U.device
        if adapted_groups is None:
            adapted_G = self._draw_memory(step, sample_ids_U[sets.first_samples(device)])
        else:
            adapted_G = torch.arange(sets.count) < adapted_groups * sets.per_row
        adapted_U = adapted_G[sets.of_samples(device)]
        rows_C = self._inner_rows(adapted_G.view(-1, sets.per_row).any(1), sets.rows_per_set)
        if len(rows_C) == 0:
            return [], rows_C, adapted_U
        draw, anchor = draw.rows(rows_C), anchor.rows(rows_C)
        target_BL = draw.broadcast(adapted_U.view(rows, -1)[rows_C].flatten())
        states = [replace(x, target_BL=x.target_BL & target_BL) for x in self.plan.states(draw, anchor)]
        return states, rows_C if len(rows_C) < rows else None, adapted_U

    def _inner_rows(self, chosen_R: Tensor, rows_per_set: int) -> Tensor:
        """Return the rows that the inner loop reads: those of the chosen groups, and others up to one of `row_counts`.

        Args:
            chosen_R: bool, for each group of rows.
            rows_per_set: rows of a group.
        """
        groups = len(chosen_R)
        count = min(c for c in self.row_counts(groups) if c >= int(chosen_R.sum()))
        first_C1 = chosen_R.int().argsort(descending=True, stable=True)[:count].sort().values.unsqueeze(1)
        return (first_C1 * rows_per_set + torch.arange(rows_per_set)).flatten()

    def row_counts(self, groups: int) -> list[int]:
        """Return the possible numbers of groups of rows that the inner loop reads: 0, powers of two, and all.

        With expert parallelism all ranks of a group exchange tokens in every pass, so the inner loop reads all rows.
        """
        if self.memory is not None and self.memory.ep_mesh is not None:
            return [groups]
        return [0, *(2**i for i in range((groups - 1).bit_length())), groups]

    def loss_sum(
        self, model: LLaDA, batch: MicroBatch, step: int, use_memory: bool = True, measures: bool = False
    ) -> tuple[Tensor, InnerStatistics | None]:
        """Return the outer loss, the sum of w(t) * nll over this rank's masked tokens, and the inner loop's statistics.

        With the loss norm "answer", w(t) is divided by the number of maskable tokens in the token's sample. The inner
        loop runs first, unless `use_memory` is false; the statistics are then None. See `bilevel.outer_loss` for
        `measures` and the smoothing of labels.
        """
        if self.memory is None or not use_memory:
            return outer_loss(model, batch, None, tp_rank=self.tp_rank, label_smoothing=self.label_smoothing)
        fast = self.memory.draw(self.seed, step, batch.sample_ids_U, batch.slots) if batch.inner else None
        loss, statistics = outer_loss(
            model, batch, self.memory, fast, self.tp_rank, measures=measures, label_smoothing=self.label_smoothing
        )
        if statistics is None:  # no sample of this micro-batch trains with the memory
            statistics = empty_statistics(planned_steps(self.plan), self.memory, measures, loss.device)
        return loss, statistics

    def variants(self, rows: int) -> list[tuple["Objective", int | None]]:
        """Return the objectives that training runs, with the values of `micro_batch`'s `adapted_groups`.

        Compiled blocks have graphs of their own for each variant.

        Args:
            rows: rows of a micro-batch.
        """
        if self.memory is None:
            return [(self, None)]
        counts: list[int | None] = [None]
        if self.probability < 1 and not self.by_step:
            counts = [*self.row_counts(rows // Sets(rows, self.slots or 1, self.memory.samples_per_set).rows_per_set)]
        has_plain_steps = self.start_step > 1 or (self.probability < 1 and self.by_step)
        with_memory = replace(self, probability=1.0) if self.by_step else self
        return [*([(replace(self, memory=None), None)] if has_plain_steps else []), *((with_memory, c) for c in counts)]


def build_objective(
    config: JobConfig,
    args: LLaDAArgs,
    mask_token_id: int,
    layout: Layout,
) -> Objective:
    """Build the objective of a configuration for this rank."""
    memory = config.parametric_memory
    tp_mesh, cp_mesh = (layout.get_optional_mesh(name) for name in ("tp", "cp"))
    return Objective(
        mask_token_id=mask_token_id,
        plan=get_plan(config),
        memory=_memory(memory, args, layout) if memory.enable else None,
        # Without debug.seed torchtitan draws a random seed for the weights. The noise then uses seed 0, so a resumed
        # run continues with the same noise.
        seed=config.debug.seed or 0,
        tp_size=tp_mesh.size() if tp_mesh else 1,
        tp_rank=tp_mesh.get_local_rank() if tp_mesh else 0,
        probability=memory.probability,
        probability_unit=memory.probability_unit,
        start_step=memory.start_step,
        adapter_dropout=config.lora.dropout if config.model.converters else 0.0,
        fast_weight_dropout=memory.dropout,
        shifted=args.shifted,
        cp_size=cp_mesh.size() if cp_mesh else 1,
        cp_rank=cp_mesh.get_local_rank() if cp_mesh else 0,
        loss_norm=config.diffusion.loss_norm,
        label_smoothing=config.diffusion.label_smoothing,
    )


def get_plan(config: JobConfig) -> Plan:
    """Return the plan of the inner loop: trajectory, scored tokens and loss weights."""
    memory, diffusion = config.parametric_memory, config.diffusion
    return Plan(
        trajectory=memory.trajectory,
        inner_steps=memory.inner_steps,
        pre_anchor_scale=memory.pre_anchor_scale,
        progressive_end=memory.progressive_end,
        supervision=memory.supervision,
        schedule=diffusion.schedule,
        loss_weight=diffusion.loss_weight,
    )


def get_inner_loss(memory: ParametricMemory) -> InnerLoss:
    """Return the loss that an inner step minimises."""
    return inner_loss(memory.inner_loss, memory.student_hidden, memory.teacher_hidden, memory.distillation_temperature)


def get_samples_per_set(memory: ParametricMemory) -> int | None:
    """Return the number of samples that share a set of fast weights; None: all of a micro-batch."""
    return None if memory.granularity == "batch" else memory.samples_per_set


def first_adapted_layer(memory: ParametricMemory, args: LLaDAArgs) -> int:
    """Return the index of the first layer with fast weights, int(n_layers * (1 - layer_fraction))."""
    return int(args.n_layers * (1 - memory.layer_fraction))


def _memory(memory: ParametricMemory, args: LLaDAArgs, layout: Layout) -> Memory:
    first_layer = first_adapted_layer(memory, args)
    return Memory(
        first_layer=first_layer,
        linears=args.adapted_linears(first_layer, memory.target_modules),
        fast_weight_type=memory.adapter,
        rank=memory.rank,
        alpha=memory.alpha,
        loss=get_inner_loss(memory),
        optimiser=InnerSGD(
            memory.learning_rate, memory.gradient_clip, memory.gradient_norm, memory.learning_rate_scale, args.dim
        ),
        samples_per_set=get_samples_per_set(memory),
        inner_epochs=memory.inner_epochs,
        tp_mesh=layout.get_optional_mesh("tp"),
        ep_mesh=layout.get_optional_mesh("ep"),
        cp_mesh=layout.get_optional_mesh("cp"),
    )
