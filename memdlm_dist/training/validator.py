"""Validation: held-out loss with the memory off and on, with the same noise at every validation."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.dataset import open_dataset
from memdlm_dist.data.row_shape import check_cards, group_size
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.method.diffusion import level_from_uniform
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.models import backbone_args
from memdlm_dist.models.layout import Layout
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.runtime.device import device_type
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.training import validation_history
from memdlm_dist.training.backbone import get_shard_requirements
from memdlm_dist.training.memory_dependence import MemoryDependence
from memdlm_dist.training.metrics import MemDLMMetrics
from memdlm_dist.training.objective import build_objective
from memdlm_dist.training.validation_history import LOSSES

logger = logging.getLogger()

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_SQRT_2 = 2**0.5


class HeldOutValidator:
    """torchtitan validator that measures the likelihood bound of the held-out sequences, in nats per maskable token.

    The noise is keyed by the sample id alone, not by the run's seed, so it is the same at every validation, in every
    run and on any number of ranks. The noise levels are not random but spread evenly over (0, 1), see `even_levels`:
    with loss weights 1/t, random levels give a noisy bound. The loss weight is always the schedule's and the mean is
    always over tokens, regardless of `diffusion.loss_weight` and `diffusion.loss_norm`.

    With the memory on, the inner loop first runs on the scored state, as in training. That loss is lower by
    construction. To compare base models, use the loss with the memory off.
    """

    slots: int | None = None  # document slots per row, set by the trainer, see `Objective.slots`

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: DiffusionTokenizer,
        parallel_dims: Layout,
        validation_context: Any,
        maybe_enable_amp: Any,
        metrics_processor: MemDLMMetrics,
        **pipeline: Any,
    ):
        self.job_config = job_config
        self.progress: Callable[[str], None] = lambda doing: None  # callback, called once per batch
        del pipeline  # parse_config rejects pipeline parallelism
        self._dp_size, self._dp_rank = dp_world_size, dp_rank
        self._parallel_dims, self._metrics = parallel_dims, metrics_processor
        self._context, self._amp = validation_context, maybe_enable_amp
        args = backbone_args(job_config.model.name, job_config.model.flavor)
        self._objective = build_objective(job_config, args, tokenizer.mask_id, parallel_dims).held_out()
        data, training = job_config.data, job_config.training
        self.rows = check_cards(data.validation, get_shard_requirements(job_config, tokenizer.mask_id))
        self.batch_size = job_config.validation.local_batch_size or training.local_batch_size
        # Called for its check: held-out rows are read in order, so a whole batch holds whole groups.
        group_size(
            self.rows,
            job_config.parametric_memory.group_size,
            "data.validation",
            "validation.local_batch_size",
            self.batch_size,
        )
        self._dataset = open_dataset(
            data,
            data.validation,
            [],
            self.rows,
            batch_size=self.batch_size,
            shuffle=False,
            mask_prompt=data.mask_prompt,
        )
        steps, global_batch_size = job_config.validation.steps, self.batch_size * dp_world_size
        self._samples = self._dataset.size if steps == -1 else min(self._dataset.size, steps * global_batch_size)
        self._dependence = MemoryDependence()

    def should_validate(self, step: int) -> bool:
        """Return whether to validate after a step: every `validation.freq` steps, and after the last one."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield (tokens, labels, sample ids, documents) of this rank's rows of each global batch.

        Every rank yields the same number of batches. Rows past the last sample repeat it without labels, so they do
        not count.
        """
        first = self._dp_rank * self.batch_size
        for start in range(first, first + self._samples, self._dp_size * self.batch_size):
            ids = torch.arange(start, start + self.batch_size)
            rows = [self._dataset[int(i)] for i in ids.clamp(max=self._samples - 1)]
            if self.rows.buckets:
                on_all_ranks = start - first + np.arange(self._dp_size * self.batch_size)
                length = self._dataset.row_lengths.bucket(on_all_ranks.clip(max=self._samples - 1))
                rows = [self._dataset.fill_up(row, int(length)) for row in rows]
            labels = torch.stack([row["labels"] for row in rows])
            labels[ids >= self._samples] = IGNORE_INDEX
            documents = torch.stack([row["documents"] for row in rows]) if "documents" in rows[0] else None
            yield torch.stack([row["tokens"] for row in rows]), labels, ids, documents

    def validate(self, model_parts: list[torch.nn.Module], step: int) -> dict[str, float]:
        """Measure the held-out losses, log them and append them to the history; return them by TensorBoard tag."""
        model = cast(LLaDA, model_parts[0])
        objective = replace(self._objective, slots=self.slots)
        names = LOSSES if objective.memory else LOSSES[:1]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device_type())
        began = time.perf_counter()
        # No model.eval(): the backbone drops only where a micro-batch says so, and the mode change would recompile the
        # compiled blocks.
        for tokens, labels, ids, documents in self._batches():
            self.progress(f"validating at step {step}")
            slots = 1 if documents is None else self.slots or Documents.from_numbers(documents).slots
            batch = objective.micro_batch(
                tokens,
                labels,
                ids,
                step=0,
                t_U=even_levels(ids, slots),
                outer_weight="schedule",
                documents_BL=documents,
            ).to(device_type())
            for i, loss in enumerate(self.losses(model, batch)):
                sums[i] += loss.double()
            sums[-1] += (labels != IGNORE_INDEX).sum()
        mesh = self._parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            torch.distributed.all_reduce(sums, group=mesh.get_group())
        *totals, tokens_seen = sums.tolist()
        tokens_seen /= self._parallel_dims.cp  # every context-parallel rank counted whole rows
        losses = {name: total / max(tokens_seen, 1) for name, total in zip(names, totals, strict=True)}
        self._report(losses, step)
        if len(names) == 2 and (warning := self._dependence.check(step, *losses.values())):
            logger.warning(warning)
        self._metrics.exclude(time.perf_counter() - began)
        return losses

    def losses(self, model: LLaDA, batch: MicroBatch) -> list[Tensor]:
        """Return the loss sums of a micro-batch: memory off, and memory on if the objective has a memory."""
        loss_sums = []
        for use_memory in (False, True) if self._objective.memory else (False,):
            with torch.no_grad(), self._context(), self._amp:
                loss_sums.append(self._objective.loss_sum(model, batch, step=0, use_memory=use_memory)[0])
        return loss_sums

    def _report(self, losses: dict[str, float], step: int) -> None:
        """Write the losses to TensorBoard; on rank 0 also to the log and the history."""
        self._metrics.log_scalars(losses, step)
        text = "  ".join(f"{name.removeprefix('validation/')}: {loss:.4f}" for name, loss in losses.items())
        if is_rank_0():
            logger.info(f"validate step: {step}  {text}  ({self._samples} held-out sequences)")
            validation_history.append(validation_history.path_in(self.job_config.job.dump_folder), step, losses)


def even_levels(row_ids_B: Tensor, slots: int) -> Tensor:
    """Return evenly spread noise levels of the rows' samples, float64 `[B * slots]`.

    Document s of row i is at frac((i + 1/2) phi + s sqrt(2)) of the range, phi = 0.618...: a low-discrepancy sequence.
    """
    point_BS = (row_ids_B.double() + 0.5).unsqueeze(1) * _GOLDEN_RATIO + torch.arange(slots) * _SQRT_2
    return level_from_uniform(point_BS.flatten() % 1)
