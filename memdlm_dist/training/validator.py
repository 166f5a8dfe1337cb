"""Held-out loss with the memory off and on, on the same noise every time."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims

from memdlm_dist.data.dataset import check_cards, open_dataset
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.method.diffusion import level_from_uniform
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.models import backbone_args
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.runtime.device import device_type
from memdlm_dist.training.metrics import MemDLMMetrics
from memdlm_dist.training.objective import build_objective

logger = logging.getLogger()

LOSSES = ("validation/loss_memory_off", "validation/loss_memory_on")
HISTORY_FILE = "validation.jsonl"
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_ROOT = 2**0.5  # spreads the documents of a row


class HeldOutValidator(BaseValidator):
    """The likelihood bound of the held-out sequences, in nats per maskable token.

    The noise is keyed by the sample id alone, not by the run's seed, so it is the same at every
    validation, in every run and on any number of ranks. The noise levels are not random but spread
    evenly over (0, 1), row i at frac(i phi): the weights 1/t make the bound of a random draw noisy.
    The weight of the scored loss is the schedule's, whatever `diffusion.loss_weight` says.

    Memory on: the inner loop first runs on the very state that is scored, as in training. That loss
    is lower by construction; memory off is the one that compares base models.
    """

    def __init__(
        self,
        job_config: Any,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: DiffusionTokenizer,
        parallel_dims: ParallelDims,
        validation_context: Any,
        maybe_enable_amp: Any,
        metrics_processor: MemDLMMetrics,
        **pipeline: Any,
    ):
        super().__init__(job_config)
        self.progress: Callable[[str], None] = lambda doing: None  # told of every batch
        del pipeline  # refused by the configuration's check
        self._dp_size, self._dp_rank = dp_world_size, dp_rank
        self._parallel_dims, self._metrics = parallel_dims, metrics_processor
        self._context, self._amp = validation_context, maybe_enable_amp
        args = backbone_args(job_config.model.name, job_config.model.flavor)
        self._objective = replace(
            build_objective(job_config, args, tokenizer.mask_id, parallel_dims), seed=0, probability=1.0
        )
        data, training = job_config.data, job_config.training
        documents = check_cards(job_config, data.validation, tokenizer)
        self._batch_size = job_config.validation.local_batch_size or training.local_batch_size
        self._dataset = open_dataset(
            job_config, data.validation, [], batch_size=self._batch_size, documents=documents, shuffle=False
        )
        steps, every = job_config.validation.steps, self._batch_size * dp_world_size
        self._samples = self._dataset.size if steps == -1 else min(self._dataset.size, steps * every)
        self._leaning = Leaning()

    def should_validate(self, step: int) -> bool:
        """Besides every `validation.freq` steps, after the last one."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """This rank's rows of each global batch; past the end, rows that count for nothing.

        Every rank makes the same number of passes, whatever the number of samples.
        """
        first = self._dp_rank * self._batch_size
        for start in range(first, first + self._samples, self._dp_size * self._batch_size):
            ids = torch.arange(start, start + self._batch_size)
            rows = [self._dataset[int(i)] for i in ids.clamp(max=self._samples - 1)]
            labels = torch.stack([row["labels"] for row in rows])
            labels[ids >= self._samples] = IGNORE_INDEX
            documents = torch.stack([row["documents"] for row in rows]) if "documents" in rows[0] else None
            yield torch.stack([row["tokens"] for row in rows]), labels, ids, documents

    def validate(self, model_parts: list[torch.nn.Module], step: int) -> dict[str, float]:
        """Measure, log and append to the history; returns the losses by their TensorBoard names."""
        model = cast(LLaDA, model_parts[0])
        objective = self._objective
        names = LOSSES if objective.memory else LOSSES[:1]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device_type())
        began = time.perf_counter()
        # No model.eval(): the backbone has no dropout, and compiled blocks would be compiled again.
        for tokens, labels, ids, documents in self._batches():
            self.progress(f"validating at step {step}")
            slots = Documents.of(documents).slots if documents is not None else 1
            batch = objective.micro_batch(
                tokens,
                labels,
                ids,
                step=0,
                t_U=even_levels(ids, slots),
                outer_weight="schedule",
                documents_BL=documents,
            ).to(device_type())
            for i in range(len(names)):
                with torch.no_grad(), self._context(), self._amp:
                    loss, _ = objective.loss_sum(model, batch, step=0, use_memory=i == 1)
                sums[i] += loss.double()
            sums[-1] += (labels != IGNORE_INDEX).sum()
        mesh = self._parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            torch.distributed.all_reduce(sums, group=mesh.get_group())
        *totals, tokens_seen = sums.tolist()
        tokens_seen /= self._parallel_dims.cp  # each rank of a context-parallel group counted whole rows
        losses = {name: total / max(tokens_seen, 1) for name, total in zip(names, totals, strict=True)}
        self._report(losses, step)
        if len(names) == 2 and (warning := self._leaning.look(step, *losses.values())):
            logger.warning(warning)
        self._metrics.exclude(time.perf_counter() - began)
        return losses

    def _report(self, losses: dict[str, float], step: int) -> None:
        self._metrics.log_scalars(losses, step)
        text = "  ".join(f"{name.removeprefix('validation/')}: {loss:.4f}" for name, loss in losses.items())
        if int(os.environ.get("RANK", "0")) == 0:
            logger.info(f"validate step: {step}  {text}  ({self._samples} held-out sequences)")
            with open(history_path(self.job_config), "a") as file:
                file.write(json.dumps({"step": step, **losses}) + "\n")


def even_levels(row_ids_B: Tensor, slots: int) -> Tensor:
    """Noise levels of rows' samples, float64 `[B * slots]`: evenly spread, whichever the rows are."""
    place_BS = (row_ids_B.double() + 0.5).unsqueeze(1) * _GOLDEN_RATIO + torch.arange(slots) * _ROOT
    return level_from_uniform(place_BS.flatten() % 1)


class Leaning:
    """Watches for a base that comes to lean on fast weights that were just written on its targets.

    The sign is a loss with the memory off that is above its best by more than 1 % while the loss with the memory on
    is below what it was then.
    """

    def __init__(self) -> None:
        self._step, self._off, self._on = 0, math.inf, math.inf

    def look(self, step: int, off: float, on: float) -> str:
        """A warning as one sentence; empty if there is nothing to warn of."""
        if off <= self._off:
            self._step, self._off, self._on = step, off, on
            return ""
        if off <= 1.01 * self._off or on >= self._on:
            return ""
        return (
            f"The held-out loss with the memory off rose from {self._off:.4f} (step {self._step}) to {off:.4f}, while "
            f"with the memory on it fell from {self._on:.4f} to {on:.4f}: the model comes to lean on its fast weights, "
            "and will be worse without them; start from a pre-trained base (checkpoint.initial_load_path), or lower "
            "parametric_memory.probability, parametric_memory.learning_rate or optimizer.lr."
        )


def history_path(job_config: Any) -> Path:
    return Path(job_config.job.dump_folder) / HISTORY_FILE


def history(path: Path) -> list[dict[str, float]]:
    """The validations of a folder's last run.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"The validations in {path} cannot be read: {error}.") from None
    # The file outlives a run that was started anew in the same folder: the last one began at its last step 0.
    begin = max((i for i, row in enumerate(rows) if row["step"] == 0), default=0)
    return rows[begin:]


def summary_table(job_config: Any) -> str | None:
    """The first and the last validation of a run as a table; None if there is none yet."""
    path = history_path(job_config)
    if not path.is_file():
        return None
    rows = history(path)
    first, last = rows[0], rows[-1]
    lines = ["held-out loss (nats per token)    memory off    memory on"]
    for label, row in (("start", first), ("end", last)):
        values = "".join(f"{row[name]:>13.4f}" if name in row else f"{'-':>13}" for name in LOSSES)
        lines.append(f"  {label:<5} (step {row['step']:>6})            {values}")
    return "\n".join(lines)


def build_validator(**arguments: Any) -> HeldOutValidator:
    arguments.pop("loss_fn")
    return HeldOutValidator(**arguments)
