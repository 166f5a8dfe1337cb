"""torchtitan's Trainer with the bi-level step."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer

from memdlm_dist.checkpoint.continuity import identity
from memdlm_dist.checkpoint.manager import ResumableCheckpoints
from memdlm_dist.data.loader import Batch
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.llada_moe import LLaDAMoE
from memdlm_dist.runtime.preemption import StopRequest
from memdlm_dist.runtime.watchdog import start_watchdog
from memdlm_dist.training.agreement import StepAgreement
from memdlm_dist.training.metrics import HARDWARE_FLOPS, MASK_RATIO, SKIPPED_BATCHES, MemDLMMetrics
from memdlm_dist.training.objective import Objective, build_objective

logger = logging.getLogger()


class MemDLMTrainer(Trainer):
    """torchtitan's Trainer on the bi-level objective.

    torchtitan counts the labels that are not ignored, over micro-batches and ranks, which is the number
    of maskable tokens: the outer loss's denominator. So only the forward and backward pass of one
    micro-batch is ours, and what is drawn for it on the host.
    """

    metrics_processor: MemDLMMetrics
    checkpointer: ResumableCheckpoints
    objective: Objective
    plain_objective: Objective  # the same without memory, for the steps before parametric_memory.start_step
    recomputation: Recomputation

    def __init__(self, job_config: Any, stop: StopRequest):
        super().__init__(job_config)
        self.stop = stop
        self.objective = build_objective(job_config, self.model_args, self.tokenizer.mask_id, self.parallel_dims)
        self.plain_objective = replace(self.objective, memory=None)
        checkpointing = job_config.activation_checkpoint
        self.recomputation = Recomputation(checkpointing.mode, checkpointing.selective_ac_option)
        self.checkpointer.identity = identity(
            job_config, self.dataloader.global_batch_size, self.dataloader.fingerprint
        )
        self.checkpointer.lora = job_config.lora if job_config.model.converters else None
        self.checkpointer.stop_on_save_failure = job_config.reliability.on_save_failure == "stop"
        self.agreement = StepAgreement(self.model_parts, job_config.reliability, self.device)
        self.optimizers.register_step_pre_hook(self._before_optimizer)
        self.watchdog = start_watchdog(job_config.comm.init_timeout_seconds)
        if job_config.validation.enable:
            self.validator.progress = self.watchdog.at
        self._stopping = self._first_step_done = False

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """torchtitan's generator, each batch with its noise drawn; called once, after a checkpoint is loaded."""
        if self.step >= self.job_config.training.steps:
            logger.info(
                f"This run is complete: its checkpoint is at step {self.step} of training.steps = "
                f"{self.job_config.training.steps}; raise that to go on, or change job.dump_folder to start anew."
            )
        elif self.step == 0 and self.job_config.validation.enable:
            self.validator.validate(self.model_parts, 0)
        return self._with_noise(super().batch_generator(data_iterable))

    def _with_noise(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            # A rank whose data do not come holds the others up, and not the other way round.
            self.watchdog.at(f"loading the data of step {self.step}", needs_others=False)
            inputs, labels = next(batches)
            self.watchdog.at(f"taking step {self.step}")
            start = self.job_config.parametric_memory.start_step
            objective = self.objective if self.step >= start else self.plain_objective
            batch = objective.micro_batch(
                inputs["input"], labels, inputs["sample_id"], self.step, documents_BL=inputs.get("documents")
            )
            yield {**inputs, "micro_batch": batch}, labels  # type: ignore[dict-item]

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        self.metrics_processor.start_step()
        self.agreement.start_step()
        super().train_step(data_iterator)
        self._after_first_step()
        self.watchdog.at(f"finishing step {self.step} (checkpoint, validation)", needs_others=False)

    def _before_optimizer(self, *_: Any) -> None:
        """Take down the load of the experts, and agree: are the gradients finite, is the run to stop here?"""
        (model,) = self.model_parts
        if isinstance(model, LLaDAMoE) and self.metrics_processor.should_log(self.step):
            self.metrics_processor.record_expert_load(model.take_load())
        stop, wrong = self.agreement.reach(self.stop.requested)
        if stop:
            self._stopping = self.checkpointer.save_now = True
        if wrong:
            self.agreement.skip(self.step, wrong)
            # Parameters without a gradient are left alone, and their optimizer state too.
            self.optimizers.zero_grad(set_to_none=True)
        self.metrics_processor.totals[SKIPPED_BATCHES] = self.agreement.skipped

    def _after_first_step(self) -> None:
        """torchtitan tightens the timeouts after step 1; a run that was resumed has another first step."""
        if self._first_step_done:
            return
        self._first_step_done = True
        seconds = self.job_config.comm.train_timeout_seconds
        if self.step != 1:
            dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        self.watchdog.timeout = seconds

    def should_continue_training(self) -> bool:
        return super().should_continue_training() and not self._stopping

    @property
    def stopped_early(self) -> bool:
        """Whether the run was asked to stop before its last step."""
        return self._stopping and self.step < self.job_config.training.steps

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's, but for the run as a whole: a checkpoint keeps what one rank says."""
        seen = self.ntokens_seen * self._data_parallel_ranks
        return {"step": self.step, "ntokens_seen": seen, "skipped_batches": self.agreement.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state_dict["step"], state_dict["ntokens_seen"] // self._data_parallel_ranks
        self.agreement.skipped = state_dict["skipped_batches"]

    @property
    def _data_parallel_ranks(self) -> int:
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def close(self) -> None:
        if hasattr(self, "watchdog"):
            self.watchdog.stop()
        super().close()

    def forward_backward_step(
        self, *, input_dict: dict[str, Any], labels: torch.Tensor, global_valid_tokens: torch.Tensor | float
    ) -> torch.Tensor:
        """The bi-level step of one micro-batch; returns its share of the global loss."""
        (model,) = self.model_parts
        batch = input_dict["micro_batch"].to(self.device)
        with self.train_context():
            with self.maybe_enable_amp:
                loss_sum, statistics = self.objective.loss_sum(model, batch, self.step)
                loss = loss_sum / _at_least_one(global_valid_tokens)
            loss.backward()
        self.agreement.record(loss, input_dict["sample_id"])
        if self.metrics_processor.should_log(self.step):
            self.metrics_processor.record_rank_loss(loss_sum, batch.maskable)
            self.metrics_processor.record_ratio(MASK_RATIO, batch.masked, batch.maskable)
            if statistics is not None:
                self.metrics_processor.record_inner_loop(statistics)
                frozen = self.checkpointer.lora is not None
                flops = step_flops(self.model_args, batch, self.objective.memory, self.recomputation, frozen)
                both, plain = torch.tensor([flops.outer + flops.inner, flops.outer], device=self.device)
                self.metrics_processor.record_ratio(HARDWARE_FLOPS, both, plain)
        return loss


def _at_least_one(count: torch.Tensor | float) -> torch.Tensor | float:
    """The denominator of the loss: a global batch without a maskable token has a loss of 0 and no gradient.

    torchtitan counts on the device, or over ranks into a number; neither is moved here, which would wait.
    """
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
