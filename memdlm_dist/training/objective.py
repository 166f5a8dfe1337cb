"""Objective of a configuration: draws the noise of a micro-batch and computes its loss.

This is the only module that knows all three: configuration, parallel layout and mathematics (`method/`). Training,
validation and inference share it.

Shapes: B rows, L tokens, U samples (rows, or documents of packed rows).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memdlm_dist.config.job_config import JobConfig, ParametricMemory
from memdlm_dist.method import keyed_random, trajectory
from memdlm_dist.method.bilevel import Memory, outer_loss
from memdlm_dist.method.diffusion import LOSS_NORMS
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.inner_loss import InnerLoss, inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.keyed_dropout import Dropout, TermDropout
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.method.micro_batch import MicroBatch, micro_batch
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
    probability: float = 1.0  # share of the samples that train with the memory
    adapter_dropout: float = 0.0  # probability of dropping an input feature of an outer adapter
    fast_weight_dropout: float = 0.0  # probability of dropping an input feature of a fast weight's term
    shifted: bool = False  # the backbone predicts the next token
    cp_size: int = 1
    cp_rank: int = 0
    loss_norm: str = "token"  # a key of `LOSS_NORMS`; the sum of `loss_sum` is over tokens weighted accordingly
    slots: int | None = (
        None  # document slots per packed row; None: chosen per micro-batch, see `Documents.from_numbers`
    )

    def micro_batch(
        self,
        tokens_BL: Tensor,
        labels_BL: Tensor,
        sample_ids_B: Tensor,
        step: int,
        t_U: Tensor | None = None,
        outer_weight: str | None = None,
        documents_BL: Tensor | None = None,
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
        return micro_batch(
            tokens_BL,
            maskable_BL,
            sample_ids_U,
            outer,
            states=self._inner_states(draw, anchor, step, sample_ids_U) if self.memory is not None else [],
            mask_token_id=self.mask_token_id,
            with_teacher=self.memory is not None and self.memory.loss.teacher is not None,
            sequence_shards=self.cp_size * self.tp_size,
            shifted=self.shifted,
            documents=documents,
            dropout=self._dropout(step, sample_ids_U, tokens_BL.shape[1], documents),
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
        """Return the objective of held-out losses per token: noise of seed 0, memory for all samples, no dropout."""
        return replace(self, seed=0, probability=1.0, loss_norm="token", adapter_dropout=0.0, fast_weight_dropout=0.0)

    def _inner_states(self, draw: Draw, anchor: State, step: int, sample_ids_U: Tensor) -> list[State]:
        """Return the plan's states; samples drawn to train without the memory have no targets.

        A sample without targets leaves its fast weights unchanged. Samples that share a set of fast weights, on all
        ranks, share the draw.
        """
        states = self.plan.states(draw, anchor)
        assert self.memory is not None
        if self.probability == 1:
            return states
        ids = sample_ids_U if self.memory.per_sample else torch.zeros_like(sample_ids_U)
        u_U1 = keyed_random.uniform(keyed_random.key(self.seed, Stream.MEMORY, step, ids), torch.zeros(1).long())
        has_memory = draw.broadcast(u_U1.squeeze(1) < self.probability)
        return [replace(state, target_BL=state.target_BL & has_memory) for state in states]

    def loss_sum(
        self, model: LLaDA, batch: MicroBatch, step: int, use_memory: bool = True
    ) -> tuple[Tensor, InnerStatistics | None]:
        """Return the outer loss, the sum of w(t) * nll over this rank's masked tokens, and the inner loop's statistics.

        With the loss norm "answer", w(t) is divided by the number of maskable tokens in the token's sample. The inner
        loop runs first, unless `use_memory` is false or the micro-batch has no inner states; the statistics are then
        None. See `bilevel.outer_loss`.
        """
        memory = self.memory if use_memory and batch.inner else None
        fast = memory.draw(self.seed, step, batch.sample_ids_U) if memory else None
        return outer_loss(model, batch, memory, fast, self.tp_rank)


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
        adapter_dropout=config.lora.dropout if config.model.converters else 0.0,
        fast_weight_dropout=memory.dropout,
        shifted=args.shifted,
        cp_size=cp_mesh.size() if cp_mesh else 1,
        cp_rank=cp_mesh.get_local_rank() if cp_mesh else 0,
        loss_norm=config.diffusion.loss_norm,
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
        optimiser=InnerSGD(memory.learning_rate, memory.gradient_clip, memory.gradient_norm),
        per_sample=memory.granularity == "sample",
        inner_epochs=memory.inner_epochs,
        tp_mesh=layout.get_optional_mesh("tp"),
        ep_mesh=layout.get_optional_mesh("ep"),
        cp_mesh=layout.get_optional_mesh("cp"),
    )
