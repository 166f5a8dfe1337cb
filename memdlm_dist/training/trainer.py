"""torchtitan's Trainer with the bi-level step: `train` is the loop, `train_step` one step, each from top to bottom."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from torchtitan.train import Trainer

from memdlm_dist.checkpoint.continuity import identity
from memdlm_dist.checkpoint.manager import ResumableCheckpoints
from memdlm_dist.config.experiment import get_experiment
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.dataset import max_documents
from memdlm_dist.data.loader import Batch
from memdlm_dist.method.documents import power_of_two
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.llada_moe import LLaDAMoE
from memdlm_dist.runtime.preemption import StopRequest
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.runtime.watchdog import start_watchdog
from memdlm_dist.training.backbone import get_lora
from memdlm_dist.training.consensus import StepConsensus
from memdlm_dist.training.metrics import HARDWARE_FLOPS, MASK_RATIO, SKIPPED_BATCHES, MemDLMMetrics
from memdlm_dist.training.objective import Objective, build_objective
from memdlm_dist.training.prefetch import BatchPrefetcher, DrawnBatch

logger = logging.getLogger()


class MemDLMTrainer(Trainer):
    """torchtitan's Trainer, whose set-up, meshes, optimizers, schedules, checkpoints and metrics carry the outer loop.

    The outer loss's denominator is the number of tokens with a label in the global batch.
    """

    job_config: JobConfig
    metrics_processor: MemDLMMetrics
    checkpointer: ResumableCheckpoints

    def __init__(self, job_config: JobConfig, stop: StopRequest):
        super().__init__(job_config)
        self.stop = stop
        (self.model,) = self.model_parts
        self.objective = build_objective(job_config, self.model_args, self.tokenizer.mask_id, self.parallel_dims)
        self.objective = replace(self.objective, slots=self._document_slots())
        checkpointing = job_config.activation_checkpoint
        self.recomputation = Recomputation(checkpointing.mode, checkpointing.selective_ac_option)
        data = job_config.data
        self.checkpointer.identity = identity(
            self.dataloader.global_batch_size,
            job_config.debug.seed or 0,
            self.dataloader.fingerprint,
            data.shuffle,
            data.shuffle_seed,
            data.num_canonical_nodes,
            self.tokenizer.fingerprint(),
        )
        self.checkpointer.experiment = get_experiment(job_config)
        self.checkpointer.lora = get_lora(job_config)
        self.checkpointer.stop_on_save_failure = job_config.reliability.on_save_failure == "stop"
        self.consensus = StepConsensus(self.model_parts, self.optimizers, job_config.reliability, self.device)
        self.watchdog = start_watchdog(job_config.comm.init_timeout_seconds)
        if job_config.validation.enable:
            self.validator.progress, self.validator.slots = self.watchdog.at, self.objective.slots

    @record
    def train(self) -> None:
        """Load the newest checkpoint and take steps, with checkpoints and validations between them, to the last."""
        config = self.job_config
        self.checkpointer.load(step=config.checkpoint.load_step)
        logger.info(f"Training starts at step {self.step + 1}")
        if self.step >= config.training.steps:
            logger.info(
                f"This run is complete: its checkpoint is at step {self.step} of training.steps = "
                f"{config.training.steps}; raise that to go on, or change job.dump_folder to start anew."
            )
        elif self.step == 0 and config.validation.enable:
            self.validator.validate(self.model_parts, 0)

        profiling = {"global_step": self.step, "base_folder": config.job.dump_folder}
        with (
            maybe_enable_profiling(config.profiling, **profiling) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **profiling) as snapshots,
            self.prefetching(self.dataloader) as batches,
        ):
            self.dataloader.before_workers = batches.wait_until_needed
            first_step = self.step + 1
            while self.step < config.training.steps and not self.consensus.stop:
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(batches)
                if self.step == first_step:  # what was built lazily is there, and compiled
                    self._compile_ahead(resumed=first_step > 1)
                    self._shorten_timeouts()
                last = self.step == config.training.steps
                validates = config.validation.enable and self.validator.should_validate(self.step)
                if last or validates or self.consensus.stop or self.checkpointer.is_due(self.step, last):
                    # Nothing is saved or measured that may yet be found not to be finite. This waits for all ranks.
                    self.consensus.finish()
                self.watchdog.at(f"finishing step {self.step} (checkpoint, validation)", needs_others=False)
                if self.consensus.stop:
                    self.checkpointer.save_now = True
                self.checkpointer.save(self.step, last_step=last)
                if validates:
                    losses = self.validator.validate(self.model_parts, self.step)
                    self.checkpointer.note_validation(self.step, losses)
                for observer in (profiler, snapshots):
                    if observer:
                        observer.step()
        logger.info("Training completed")

    def train_step(self, batches: BatchPrefetcher) -> None:
        """Take one optimizer step: the bi-level objective over the micro-batches of the global batch."""
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        metrics = self.metrics_processor
        metrics.start_step()

        # The micro-batches with their noise, on the host; those of the next step are drawn from here on.
        drawn = self._take(batches)
        objective = self._objective_of(self.step)
        global_tokens = self._count(drawn)

        # Forward and backward; each loss is this rank's share of the global one.
        losses = []
        for one in drawn:
            batch = one.packed.to_device()
            with self.train_context():
                with self.maybe_enable_amp:
                    loss_sum, statistics = objective.loss_sum(self.model, batch, self.step)
                    loss = loss_sum / global_tokens
                loss.backward()
            losses.append(loss.detach())
            if metrics.should_log(self.step):
                self._record(one.batch, batch, loss_sum, statistics)

        # All ranks agree, before the optimizer moves: are losses and gradients finite, is the run to stop?
        self.consensus.reduce(self.step, losses, [one.sample_ids_B for one in drawn], self.stop.requested)
        grad_norm = dist_utils.clip_grad_norm_(
            list(self.model.parameters()),
            self.job_config.training.max_norm,
            foreach=True,
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        self.checkpointer.maybe_wait_for_staging()
        self.consensus.step_optimizers()
        self.lr_schedulers.step()

        if metrics.should_log(self.step):
            self.consensus.finish()
            if isinstance(self.model, LLaDAMoE):
                metrics.record_expert_load(self.model.take_load())
            metrics.totals[SKIPPED_BATCHES] = self.consensus.skipped
            metrics.log_step(self.step, torch.stack(losses).sum(), grad_norm, lr, self.tokens_seen)

    def prefetching(self, loader: Iterable[Batch]) -> BatchPrefetcher:
        """Return the source of the steps' micro-batches; a context manager."""
        steps, per_step = self.job_config.training.steps, self.gradient_accumulation_steps
        return BatchPrefetcher(loader, self._draw, per_step, steps, self.device)

    def _draw(self, batch: Batch, step: int) -> MicroBatch:
        """Draw the noise of a micro-batch; in the thread that draws ahead."""
        return self._objective_of(step).micro_batch(
            batch.tokens_BL, batch.labels_BL, batch.sample_ids_B, step, documents_BL=batch.documents_BL
        )

    def _objective_of(self, step: int) -> Objective:
        """Return a step's objective: before `start_step` plain masked diffusion."""
        started = step >= self.job_config.parametric_memory.start_step
        return self.objective if started else replace(self.objective, memory=None)

    def _take(self, batches: BatchPrefetcher) -> list[DrawnBatch]:
        """Wait for the step's micro-batches, and count what is read."""
        # A rank whose data do not come holds the others up, and not the other way round.
        self.watchdog.at(f"loading the data of step {self.step}", needs_others=False, waits_for=batches.thread)
        began = time.perf_counter()
        drawn = batches.take(self.step)
        self.metrics_processor.data_loading_times.append(time.perf_counter() - began)
        self.watchdog.at(f"taking step {self.step}")
        tokens = sum(one.tokens for one in drawn)
        self.ntokens_seen += tokens
        self.metrics_processor.ntokens_since_last_log += tokens
        self.dataloader.position = drawn[-1].position
        return drawn

    def _count(self, drawn: Sequence[DrawnBatch]) -> Tensor:
        """Return the global batch's tokens with a label, on the device; 1 for a batch without any, whose loss is 0."""
        # A number is an argument of the kernel that fills: nothing is copied to the device.
        count = torch.full((), sum(one.labelled for one in drawn), dtype=torch.int64, device=self.device)
        if self.parallel_dims.dp_enabled:
            torch.distributed.all_reduce(count, group=self.parallel_dims.get_mesh("batch").get_group())
        return count.float().clamp(min=1)

    def _record(
        self, on_host: MicroBatch, batch: MicroBatch, loss_sum: Tensor, statistics: InnerStatistics | None
    ) -> None:
        """Note what a logged step shows of one micro-batch.

        Args:
            on_host: the micro-batch where its values can be read without a wait.
            batch: the same on the device.
        """
        metrics = self.metrics_processor
        metrics.record_rank_loss(loss_sum, batch.maskable)
        metrics.record_ratio(MASK_RATIO, batch.masked, batch.maskable)
        if statistics is not None:
            metrics.record_inner_loop(statistics)
            frozen = self.checkpointer.lora is not None
            flops = step_flops(self.model_args, on_host, self.objective.memory, self.recomputation, frozen)
            both, plain = torch.tensor([flops.outer + flops.inner, flops.outer], device=self.device)
            metrics.record_ratio(HARDWARE_FLOPS, both, plain)

    def _document_slots(self) -> int | None:
        """Return the number of slots for a row's documents: a power of two, the same in the whole run.

        None where a card of the shards does not say how many documents a row holds.
        """
        most = {"data.train": self.dataloader.most_documents}
        if self.job_config.validation.enable:
            most["data.validation"] = self.validator.most_documents
        unknown = " and ".join(name for name, number in most.items() if number is None)
        if unknown and is_rank_0():
            logger.warning(
                f"The cards of the shards in {unknown} do not say how many documents a row holds: tensors will have "
                "several sizes, for each of which ranks compile at different steps; prepare the data anew."
            )
        number = max_documents(list(most.values()))
        return None if number is None else power_of_two(max(1, number))

    def _compile_ahead(self, resumed: bool) -> None:
        """Run once, on random tokens, what later steps and validations would be the first to run.

        It is then compiled under the timeout of a start, on all ranks at the same time. No state is changed: gradients
        are discarded, and buffers (the experts' loads) get their values back.

        Args:
            resumed: no validation has come before this start's first step.
        """
        config = self.job_config
        if not config.compile.enable:
            return
        began = time.perf_counter()
        self.watchdog.at("compiling what later steps and validations run")
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        if self.objective.memory is not None and self.step < config.parametric_memory.start_step:
            batch = self._random_batch(config.training.local_batch_size, self.dataloader.most_documents != 0)
            with self.train_context():
                with self.maybe_enable_amp:
                    loss_sum, _ = self.objective.loss_sum(self.model, batch, self.step)
                loss_sum.backward()
            self.optimizers.zero_grad()
        if config.validation.enable and resumed:
            batch = self._random_batch(self.validator.batch_size, self.validator.most_documents != 0)
            self.validator.losses(self.model, batch)
        for buffer, value in before:
            buffer.copy_(value)
        self.metrics_processor.exclude(time.perf_counter() - began)

    def _random_batch(self, rows: int, packed: bool) -> MicroBatch:
        """Return a micro-batch of the run's shapes, the same on every rank; packed rows hold one document."""
        shape = (rows, self.job_config.training.seq_len)
        tokens_BL = torch.randint(0, self.model_args.vocab_size, shape, generator=torch.Generator())
        documents_BL = torch.zeros_like(tokens_BL) if packed else None
        ids_B = torch.arange(rows)
        batch = self.objective.micro_batch(tokens_BL, tokens_BL, ids_B, self.step, documents_BL=documents_BL)
        return batch.to(self.device)

    def _shorten_timeouts(self) -> None:
        """Give collectives the time of a step, after the first one of this start."""
        seconds = self.job_config.comm.train_timeout_seconds
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        self.watchdog.timeout = seconds

    @property
    def stopped_early(self) -> bool:
        """Whether the run was asked to stop before its last step."""
        return self.consensus.stop and self.step < self.job_config.training.steps

    @property
    def tokens_seen(self) -> int:
        """Tokens that all ranks have read."""
        return int(self.ntokens_seen * self._data_parallel_ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return torchtitan's state, but for the run as a whole: a checkpoint keeps what one rank says."""
        return {"step": self.step, "ntokens_seen": self.tokens_seen, "skipped_batches": self.consensus.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state_dict["step"], state_dict["ntokens_seen"] // self._data_parallel_ranks
        self.consensus.skipped = state_dict["skipped_batches"]

    @property
    def _data_parallel_ranks(self) -> int:
        dims = self.parallel_dims
        return int(dims.dp_replicate * dims.dp_shard)

    def close(self) -> None:
        if hasattr(self, "watchdog"):
            self.watchdog.stop()
        super().close()
