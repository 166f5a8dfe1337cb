"""From the configuration to the objective: draws the noise of a micro-batch and runs it.

The one place where configuration, parallel layout and mathematics meet; training and validation share it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.distributed import ParallelDims

from memdlm_dist import trajectory
from memdlm_dist.bilevel import Memory, outer_loss
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.inner_loop import InnerStatistics
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.trajectory import IGNORE_INDEX, MicroBatch


@dataclass(frozen=True)
class Objective:
    """The masked-diffusion objective, with a parametric memory or without (`memory=None`)."""

    mask_token_id: int
    schedule: str
    loss_weight: str
    inner_steps: int
    pre_anchor_scale: float
    memory: Memory | None
    seed: int
    shards: int  # sequence shards: the tensor-parallel degree
    shard: int  # this rank's

    def micro_batch(
        self,
        tokens_BL: Tensor,
        labels_BL: Tensor,
        sample_ids_B: Tensor,
        step: int,
        t_B: Tensor | None = None,
        outer_weight: str | None = None,
    ) -> MicroBatch:
        """Draw the noise of a micro-batch; on the host.

        Args:
            tokens_BL: clean tokens.
            labels_BL: the same where a token may be masked, -100 elsewhere.
            sample_ids_B: global sample ids, the keys of the noise.
            step: training step; 0 for noise that stays fixed.
            t_B: noise levels; drawn if None.
            outer_weight: loss weight of the outer loss, if not the objective's own.
        """
        maskable_BL = labels_BL != IGNORE_INDEX
        t_B = trajectory.noise_levels(self.seed, step, sample_ids_B) if t_B is None else t_B
        u_BL = trajectory.token_noise(self.seed, step, sample_ids_B, tokens_BL.shape[1])
        anchor = trajectory.anchor_state(u_BL, maskable_BL, t_B, self.schedule, outer_weight or self.loss_weight)
        states = []
        if self.memory is not None:
            states = trajectory.anchor_consistent(
                u_BL,
                maskable_BL,
                anchor,
                self.inner_steps,
                self.pre_anchor_scale,
                self.schedule,
                self.loss_weight,
            )
        return MicroBatch(
            anchor=trajectory.view(anchor, tokens_BL, self.mask_token_id, self.shards),
            inner=tuple(trajectory.view(state, tokens_BL, self.mask_token_id, self.shards) for state in states),
            sample_ids_B=sample_ids_B,
            mask_ratio=anchor.mask_BL.sum() / maskable_BL.sum().clamp(min=1),
        )

    def loss_sum(
        self, model: LLaDA, batch: MicroBatch, step: int, use_memory: bool = True
    ) -> tuple[Tensor, InnerStatistics | None]:
        """Sum of w(t) nll over a micro-batch's masked tokens (see `bilevel.outer_loss`)."""
        memory = self.memory if use_memory and batch.inner else None
        fast = memory.draw(self.seed, step, batch.sample_ids_B) if memory else None
        return outer_loss(model, batch, memory, fast, self.shard)


def build_objective(
    job_config: Any,
    args: LLaDAArgs,
    tokenizer: DiffusionTokenizer,
    parallel_dims: ParallelDims,
) -> Objective:
    """The objective that a configuration describes, on this rank."""
    diffusion, memory = job_config.diffusion, job_config.parametric_memory
    tp_mesh = parallel_dims.get_optional_mesh("tp")
    return Objective(
        mask_token_id=tokenizer.mask_id,
        schedule=diffusion.schedule,
        loss_weight=diffusion.loss_weight,
        inner_steps=memory.inner_steps,
        pre_anchor_scale=memory.pre_anchor_scale,
        memory=_memory(memory, args, tp_mesh) if memory.enable else None,
        # Without a seed torchtitan draws one for the weights; the noise then starts from 0, so that a
        # resumed run goes on with its own.
        seed=job_config.debug.seed or 0,
        shards=tp_mesh.size() if tp_mesh else 1,
        shard=tp_mesh.get_local_rank() if tp_mesh else 0,
    )


def _memory(config: Any, args: LLaDAArgs, tp_mesh: torch.distributed.DeviceMesh | None) -> Memory:
    first_layer = int(args.n_layers * (1 - config.layer_fraction))
    return Memory(
        first_layer=first_layer,
        linears=args.adapted_linears(first_layer, config.target_modules),
        rank=config.rank,
        alpha=config.alpha,
        learning_rate=config.learning_rate,
        clip=config.gradient_clip,
        per_sample=config.granularity == "sample",
        tp_mesh=tp_mesh,
    )
