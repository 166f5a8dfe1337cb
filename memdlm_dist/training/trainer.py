"""torchtitan's Trainer with the bi-level step: `train` is the loop, `train_step` one optimizer step."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling
from torchtitan.train import Trainer

from memdlm_dist.checkpoint.continuity import identity
from memdlm_dist.checkpoint.manager import ResumableCheckpoints
from memdlm_dist.config.experiment import get_experiment, get_length
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data import stream_shares
from memdlm_dist.data.loader import Batch
from memdlm_dist.data.row_shape import RowShape
from memdlm_dist.errors import require
from memdlm_dist.method.diffusion import LOSS_NORMS
from memdlm_dist.method.documents import PADDING, power_of_two
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.runtime.preemption import StopRequest
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.runtime.watchdog import start_watchdog
from memdlm_dist.training.backbone import get_lora
from memdlm_dist.training.consensus import StepConsensus
from memdlm_dist.training.metrics import FILL_RATIO, HARDWARE_FLOPS, MASK_RATIO, SKIPPED_BATCHES, MemDLMMetrics
from memdlm_dist.training.objective import Objective, build_objective
from memdlm_dist.training.prefetch import BatchPrefetcher, PrefetchedBatch

logger = logging.getLogger()


class Tasks(Protocol):
    """Tasks that the model answers during training, see `validation.tasks`."""

    def is_due(self, step: int) -> bool:
        """Return whether to answer them after a step."""

    def validate(self, step: int) -> object:
        """Answer them and log the scores; a collective call."""


class MemDLMTrainer(Trainer):
    """torchtitan's Trainer with MemDLM's objective.

    Set-up, meshes, optimizers, schedules, checkpoints and metrics are torchtitan's; `train` and `train_step` replace
    its loop and its step. The outer loss is divided by the number of labelled tokens in the global batch (the label of
    any other token is -100), or by its number of samples, see `diffusion.loss_norm`.
    """

    job_config: JobConfig
    metrics_processor: MemDLMMetrics
    checkpointer: ResumableCheckpoints
    tasks: Tasks | None = None  # set after construction, since `training` must not import `evaluation`

    def __init__(self, job_config: JobConfig, stop: StopRequest):
        super().__init__(job_config)
        self.stop = stop
        (self.model,) = self.model_parts
        self.objective = build_objective(job_config, self.model_args, self.tokenizer.mask_id, self.parallel_dims)
        self.objective = replace(self.objective, slots=self._document_slots("data.train", self.dataloader.rows))
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
            data.group_by_length,
        )
        self.checkpointer.experiment, self.checkpointer.length = get_experiment(job_config), get_length(job_config)
        self.checkpointer.lora = get_lora(job_config)
        self.checkpointer.stop_on_save_failure = job_config.reliability.on_save_failure == "stop"
        biases = self.model.expert_biases() if isinstance(self.model, LLaDAMixture) else []
        self.consensus = StepConsensus(self.model_parts, self.optimizers, job_config.reliability, self.device, biases)
        self.watchdog = start_watchdog(job_config.comm.init_timeout_seconds)
        self.checkpointer.timeout = job_config.comm.init_timeout_seconds
        if job_config.validation.enable:
            self.validator.progress = self.watchdog.at
            self.validator.slots = self._document_slots("data.validation", self.validator.rows)

    @record
    def train(self) -> None:
        """Load the checkpoint of `checkpoint.load_step`, then train, save and validate up to `training.steps`."""
        config = self.job_config
        self.checkpointer.load(step=config.checkpoint.load_step)
        logger.info(f"Training starts at step {self.step + 1}")
        if is_rank_0():
            loader = self.dataloader
            stream_shares.log(loader.stream_shares(), config.training.steps, loader.global_batch_size)
            if shares := loader.token_shares():
                logger.info(f"An epoch of data.train has {shares}.")
        if self.step >= config.training.steps:
            logger.info(
                f"This run is complete: its checkpoint is at step {self.step} of {config.training.steps}; raise "
                f"training.{'epochs' if config.training.epochs else 'steps'} to continue, or change job.dump_folder to "
                "start a new run."
            )
        elif self.step == 0 and config.validation.enable:
            self.validator.validate(self.model_parts, 0)
            if self.tasks is not None:
                self.tasks.validate(0)

        profiling = {"global_step": self.step, "base_folder": config.job.dump_folder}
        with (
            maybe_enable_profiling(config.profiling, **profiling) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **profiling) as snapshots,
            self.build_prefetcher(self.dataloader) as prefetcher,
        ):
            self.dataloader.before_workers = prefetcher.wait_until_needed
            first_step = self.step + 1
            while self.step < config.training.steps and not self.consensus.stop:
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(prefetcher)
                if self.step == first_step:  # the first step does the lazy initialisation and the compilation
                    self._compile_ahead(resumed=first_step > 1)
                    self._shorten_timeouts()
                last = self.step == config.training.steps
                validates = config.validation.enable and self.validator.should_validate(self.step)
                answers = self.tasks is not None and self.tasks.is_due(self.step)
                if last or validates or answers or self.consensus.stop or self.checkpointer.is_due(self.step, last):
                    # Wait for this step's flags: only a step known to be finite may be saved or validated.
                    self.consensus.finish()
                self.watchdog.at(f"finishing step {self.step} (checkpoint, validation)", needs_others=False)
                if self.consensus.stop:
                    self.checkpointer.save_now = True
                self.checkpointer.save(self.step, last_step=last)
                if validates:
                    losses = self.validator.validate(self.model_parts, self.step)
                    self.checkpointer.note_validation(self.step, losses)
                if answers and self.tasks is not None and not self.consensus.stop:
                    self.tasks.validate(self.step)
                for observer in (profiler, snapshots):
                    if observer:
                        observer.step()
        logger.info("Training completed")

    def train_step(self, prefetcher: BatchPrefetcher) -> None:
        """Take one optimizer step on the bi-level objective, over all micro-batches of the global batch.

        In a step that is not logged the host does not wait for the device; docs/architecture.md has the exceptions.
        """
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        metrics = self.metrics_processor
        metrics.start_step()

        # This step's micro-batches, with their noise drawn. The prefetch thread starts on the next step.
        micro_batches = self._next_micro_batches(prefetcher)
        objective, measures = self.objective.at_step(self.step), metrics.should_log(self.step)
        divisor = self._loss_divisor(micro_batches)

        # Inner loop, outer loss and backward pass. A loss is this rank's share of the global batch's loss.
        losses = []
        for micro_batch in micro_batches:
            batch = micro_batch.pinned.to_device()
            with self.train_context():
                with self.maybe_enable_amp:
                    loss_sum, statistics = objective.loss_sum(self.model, batch, self.step, measures=measures)
                    loss = loss_sum / divisor
                loss.backward()
            losses.append(loss.detach())
            if measures:
                self._record_metrics(micro_batch.on_host, batch, loss_sum, statistics)

        # Consensus of all ranks: a non-finite loss or gradient skips the step, a stop request ends the run.
        self.consensus.reduce(
            self.step, losses, [micro_batch.sample_ids_B for micro_batch in micro_batches], self.stop.requested
        )
        grad_norm = dist_utils.clip_grad_norm_(
            list(self.model.parameters()),
            self.job_config.training.max_norm,
            foreach=True,
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        self.checkpointer.maybe_wait_for_staging()
        self.consensus.step_optimizers()
        self.lr_schedulers.step()

        if measures:
            self.consensus.finish()
            if isinstance(self.model, LLaDAMixture) and self.model.mixtures():
                metrics.record_expert_load(self.model.take_load())
            metrics.totals[SKIPPED_BATCHES] = self.consensus.skipped
            metrics.log_step(self.step, torch.stack(losses).sum(), grad_norm, lr, self.tokens_seen)

    def build_prefetcher(self, loader: Iterable[Batch]) -> BatchPrefetcher:
        """Build the prefetcher of the run's micro-batches, a context manager; its thread ends with the context."""
        steps, per_step = self.job_config.training.steps, self.gradient_accumulation_steps
        return BatchPrefetcher(loader, self._draw, per_step, steps, self.device)

    def _draw(self, batch: Batch, step: int) -> MicroBatch:
        """Draw the noise of a micro-batch; runs in the prefetch thread."""
        return self.objective.at_step(step).micro_batch(
            batch.tokens_BL, batch.labels_BL, batch.sample_ids_B, step, documents_BL=batch.documents_BL
        )

    def _next_micro_batches(self, prefetcher: BatchPrefetcher) -> list[PrefetchedBatch]:
        """Wait for the step's micro-batches, count their tokens and advance the loader's position."""
        # Loading needs no other rank, so a rank that is slow here is the one that blocks the others.
        self.watchdog.at(f"loading the data of step {self.step}", needs_others=False, waits_for=prefetcher.thread)
        began = time.perf_counter()
        micro_batches = prefetcher.take(self.step)
        self.metrics_processor.data_loading_times.append(time.perf_counter() - began)
        self.watchdog.at(f"taking step {self.step}")
        tokens = sum(micro_batch.tokens for micro_batch in micro_batches)
        self.ntokens_seen += tokens
        self.metrics_processor.ntokens_since_last_log += tokens
        self.dataloader.position = micro_batches[-1].loader_position
        return micro_batches

    def _loss_divisor(self, micro_batches: Sequence[PrefetchedBatch]) -> Tensor:
        """Return the number of labelled tokens, or of samples with one, in the global batch, see `diffusion.loss_norm`.

        The number is at least 1, and a float scalar on the device.
        """
        samples = LOSS_NORMS[self.objective.loss_norm].counts_samples
        number = sum(int(x.on_host.samples) if samples else x.labelled for x in micro_batches)
        # torch.full passes the number as a kernel argument, so there is no host-to-device copy.
        count = torch.full((), number, dtype=torch.int64, device=self.device)
        if self.parallel_dims.dp_enabled:
            torch.distributed.all_reduce(count, group=self.parallel_dims.get_mesh("batch").get_group())
        return count.float().clamp(min=1)  # a global batch without labels has loss 0

    def _record_metrics(
        self, on_host: MicroBatch, batch: MicroBatch, loss_sum: Tensor, statistics: InnerStatistics | None
    ) -> None:
        """Record the metrics of one micro-batch of a logged step.

        Args:
            on_host: host copy of the micro-batch, which is read without a device-to-host sync.
            batch: the micro-batch on the device.
        """
        metrics = self.metrics_processor
        samples = LOSS_NORMS[self.objective.loss_norm].counts_samples
        metrics.record_rank_loss(loss_sum, batch.samples if samples else batch.maskable)
        metrics.record_ratio(MASK_RATIO, batch.masked, batch.maskable)
        if on_host.documents is not None:
            number_BL = on_host.documents.number_BL
            fill = torch.tensor([int((number_BL == PADDING).sum()), number_BL.numel()], device=self.device)
            metrics.record_ratio(FILL_RATIO, *fill)
        if statistics is not None:
            metrics.record_inner_loop(statistics)
            frozen = self.checkpointer.lora is not None
            flops = step_flops(self.model_args, on_host, self.objective.memory, self.recomputation, frozen)
            both, plain = torch.tensor([flops.outer + flops.inner, flops.outer], device=self.device)
            metrics.record_ratio(HARDWARE_FLOPS, both, plain)

    def _document_slots(self, name: str, rows: RowShape) -> int | None:
        """Return the number of document slots per row of a data set: a power of two, constant for the whole run.

        None if the card of a stream does not state the largest number of documents in a row.

        Raises:
            UserError: if the number is not known, but must be equal on all ranks.
        """
        if rows.most_documents is not None:
            return power_of_two(max(1, rows.most_documents))
        group = self.objective.memory.group if self.objective.memory is not None else None
        require(
            group is None or group.shares != "experts",
            f"The cards of the shards in {name} do not say how many documents a row holds, which expert parallelism "
            "needs for several sets of fast weights; prepare the data anew, or set parametric_memory.granularity = "
            "'batch'.",
        )
        if is_rank_0():
            logger.warning(
                f"The cards of the shards in {name} do not say how many documents a row holds, so tensor shapes vary "
                "and ranks recompile at different steps; prepare the data anew."
            )
        return None

    def _compile_ahead(self, resumed: bool) -> None:
        """Compile the code that only later steps or validations run, by running it once on random tokens.

        Compilation then happens on all ranks at the same time and under the start-up timeout. No state changes:
        gradients are discarded and buffers (the experts' loads) are restored.

        Args:
            resumed: the run resumed from a checkpoint, so that no validation has run since its start.
        """
        config = self.job_config
        if not config.compile.enable:
            return
        began = time.perf_counter()
        self.watchdog.at("compiling later steps and validations")
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        rows, batch_size = self.dataloader.rows, config.training.local_batch_size
        lengths = rows.buckets or (config.training.seq_len,)
        variants = self.objective.variants(batch_size)
        # The first step has compiled its own objective at one length.
        for objective, groups in variants if len(variants) * len(lengths) > 1 else []:
            for length in lengths:
                batch = self._random_batch(objective, batch_size, length, rows.documents, groups)
                with self.train_context():
                    with self.maybe_enable_amp:
                        loss_sum, _ = objective.loss_sum(self.model, batch, self.step)
                    loss_sum.backward()
                self.optimizers.zero_grad()
        if config.validation.enable and (resumed or self.validator.rows.buckets):
            rows = self.validator.rows
            for length in rows.buckets or (config.training.seq_len,):
                batch = self._random_batch(self.objective, self.validator.batch_size, length, rows.documents)
                self.validator.losses(self.model, batch)
        for buffer, value in before:
            buffer.copy_(value)
        self.metrics_processor.exclude(time.perf_counter() - began)

    def _random_batch(
        self, objective: Objective, rows: int, length: int, documents: bool, adapted_groups: int | None = None
    ) -> MicroBatch:
        """Return a random micro-batch, equal on all ranks; with documents, every row holds one."""
        shape = (rows, length)
        tokens_BL = torch.randint(0, self.model_args.vocab_size, shape, generator=torch.Generator())
        documents_BL = torch.zeros_like(tokens_BL) if documents else None
        ids_B = torch.arange(rows)
        batch = objective.micro_batch(
            tokens_BL, tokens_BL, ids_B, self.step, documents_BL=documents_BL, adapted_groups=adapted_groups
        )
        return batch.to(self.device)

    def _shorten_timeouts(self) -> None:
        """Set the timeout of collectives to `comm.train_timeout_seconds`, after the first step."""
        seconds = self.job_config.comm.train_timeout_seconds
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        self.watchdog.timeout = self.checkpointer.timeout = seconds

    @property
    def stopped_early(self) -> bool:
        """True if the run ended before its last step, on a stop request."""
        return self.consensus.stop and self.step < self.job_config.training.steps

    @property
    def tokens_seen(self) -> int:
        """Number of tokens that all ranks have read so far, padding included."""
        return int(self.ntokens_seen * self._dp_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the counters over all ranks, since a checkpoint stores this state of one rank only."""
        return {"step": self.step, "ntokens_seen": self.tokens_seen, "skipped_batches": self.consensus.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step and the counters; the number of ranks may have changed since the save."""
        self.step, self.ntokens_seen = state_dict["step"], state_dict["ntokens_seen"] // self._dp_size
        self.consensus.skipped = state_dict["skipped_batches"]

    @property
    def _dp_size(self) -> int:
        dims = self.parallel_dims
        return int(dims.dp_replicate * dims.dp_shard)

    def close(self) -> None:
        """Stop the watchdog and close torchtitan's components; call once, also after an error."""
        if hasattr(self, "watchdog"):
            self.watchdog.stop()
        super().close()
