"""Valid ranges of the configuration's numbers, in one table by key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memdlm_dist.errors import require
from memdlm_dist.method.trajectory import PROGRESSIVE_START


@dataclass(frozen=True)
class Range:
    """Valid values of a number: an interval and special values outside of it.

    Attributes:
        low: lower bound, exclusive if `above`.
        high: upper bound, exclusive if `below`.
        special: meanings of the special values.
        remedy: end of the error message.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    special: Mapping[float, str] | None = None
    remedy: str = ""

    def __contains__(self, value: float) -> bool:
        if self.special and value in self.special:
            return True
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        text = f"{'above' if self.above else 'at least'} {self.low:,}"
        if self.high < math.inf:
            text += f" and {'below' if self.below else 'at most'} {self.high:,}"
        return text + "".join(f", or {value:g} ({meaning})" for value, meaning in (self.special or {}).items())


_COUNT, _OR_NONE, _POSITIVE, _FRACTION = Range(1), Range(0), Range(0, above=True), Range(0, 1)
_BETA, _SEED = Range(0, 1, below=True), Range(0, 2**63 - 1)
_DROPOUT = Range(0, 1, below=True, remedy="0 switches dropout off")
_SECONDS = Range(1, 10**7)

RANGES: dict[str, Range] = {
    "job.format": _COUNT,
    "profiling.profile_freq": _COUNT,
    "profiling.profiler_active": _COUNT,
    "profiling.profiler_warmup": _OR_NONE,
    "metrics.log_freq": _COUNT,
    "model.rope_scaling": Range(1, 1000, remedy="1 is the backbone's own context"),
    "model.load_balance_coeff": Range(0, above=True, remedy="remove it to keep the biases"),
    "optimizer.lr": _OR_NONE,
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _OR_NONE,
    "lr_scheduler.warmup_steps": _OR_NONE,
    "lr_scheduler.warmup_ratio": _FRACTION,
    "lr_scheduler.total_steps": _COUNT,
    "lr_scheduler.decay_ratio": _FRACTION,
    "lr_scheduler.min_lr_factor": _FRACTION,
    "training.local_batch_size": Range(1, special={-1: "a rank's share of training.global_batch_size"}),
    "training.max_local_batch_size": Range(1, special={0: "no limit"}),
    "training.global_batch_size": Range(1, special={-1: "one micro-batch of each rank"}),
    "training.seq_len": _COUNT,
    "training.max_norm": Range(0, above=True, remedy="inf switches clipping off"),
    "training.steps": _COUNT,
    "training.epochs": Range(0, remedy="0 leaves the length of the run to training.steps"),
    "training.gc_freq": _COUNT,
    "training.dataloader.num_workers": Range(0, 1024),
    "training.dataloader.prefetch_factor": _COUNT,
    "parallelism.data_parallel_replicate_degree": _COUNT,
    "parallelism.data_parallel_shard_degree": Range(1, special={-1: "all ranks that the other degrees leave"}),
    "parallelism.tensor_parallel_degree": _COUNT,
    "parallelism.context_parallel_degree": _COUNT,
    "parallelism.expert_parallel_degree": _COUNT,
    "parallelism.expert_tensor_parallel_degree": _COUNT,
    "checkpoint.interval": _COUNT,
    "checkpoint.keep_latest_k": Range(
        2, special={0: "keep all"}, remedy="with 1 the only checkpoint may still be incomplete"
    ),
    "checkpoint.load_step": Range(0, special={-1: "the newest intact checkpoint"}),
    "checkpoint.keep_every": Range(1, special={0: "off"}),
    "activation_checkpoint.memory_budget": _FRACTION,
    "comm.init_timeout_seconds": _SECONDS,
    "comm.train_timeout_seconds": _SECONDS,
    "comm.trace_buf_size": _OR_NONE,
    "validation.local_batch_size": Range(1, special={0: "training.local_batch_size"}),
    "validation.freq": _COUNT,
    "validation.steps": Range(1, special={-1: "all held-out sequences"}),
    "validation.tasks_freq": Range(1, special={0: "validation.freq"}),
    "validation.tasks_samples": _COUNT,
    "validation.tasks_new_tokens": _COUNT,
    "validation.dataloader.num_workers": Range(0, 1024),
    "validation.dataloader.prefetch_factor": _COUNT,
    "debug.seed": _SEED,
    "diffusion.label_smoothing": Range(0, 1, below=True, remedy="0 switches label smoothing off"),
    "parametric_memory.start_step": _OR_NONE,
    "parametric_memory.probability": Range(
        0, 1, above=True, remedy="for no memory at all set parametric_memory.enable = false"
    ),
    "parametric_memory.inner_steps": _COUNT,
    "parametric_memory.inner_epochs": _COUNT,
    "parametric_memory.pre_anchor_scale": _POSITIVE,
    "parametric_memory.progressive_end": Range(0, PROGRESSIVE_START, above=True, remedy="0.8 is the first mask ratio"),
    "parametric_memory.distillation_temperature": _POSITIVE,
    "parametric_memory.learning_rate": _OR_NONE,
    "parametric_memory.gradient_clip": Range(0, remedy="0 switches clipping off"),
    "parametric_memory.rank": _COUNT,
    "parametric_memory.alpha": _POSITIVE,
    "parametric_memory.dropout": _DROPOUT,
    "parametric_memory.samples_per_set": _COUNT,
    "parametric_memory.layer_fraction": Range(
        0, 1, above=True, remedy="for no memory at all set parametric_memory.enable = false"
    ),
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "lora.dropout": _DROPOUT,
    "data.shuffle_seed": _SEED,
    "data.num_canonical_nodes": _COUNT,
    "data.download_retry": _COUNT,
    "data.download_timeout": Range(0, 10**7, above=True),
    "reliability.max_consecutive_skips": _COUNT,
}
# Numbers that may be infinite, to switch off the bound that they set.
_INFINITE = ("training.max_norm",)


def check(config: Any) -> None:
    """Check every number of a configuration; an unset key (None) is valid.

    Raises:
        UserError: naming the first key that is out of range, its range and its value.
    """
    for key, allowed in RANGES.items():
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        if value is None:
            continue
        finite = math.isfinite(value) or key in _INFINITE
        remedy = f"; {allowed.remedy}" if allowed.remedy else ""
        require(finite and value in allowed, f"{key} must be {allowed}, but is {value}{remedy}.")
