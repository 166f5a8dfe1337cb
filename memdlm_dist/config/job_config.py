"""Our TOML sections, which extend torchtitan's JobConfig.

Each field's docstring is what `--help` shows. Reading and checking is in `parse_config`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtitan.config.job_config import Checkpoint as TitanCheckpoint
from torchtitan.config.job_config import JobConfig as TitanJobConfig
from torchtitan.config.job_config import Model as TitanModel
from torchtitan.config.job_config import Parallelism as TitanParallelism
from torchtitan.config.job_config import Validation as TitanValidation

from memdlm_dist.method.diffusion import SCHEDULES, WEIGHTS
from memdlm_dist.method.fast_weights import ADAPTERS
from memdlm_dist.method.inner_loss import INNER_LOSSES, Hidden
from memdlm_dist.method.inner_sgd import GRADIENT_NORMS
from memdlm_dist.method.trajectory import SUPERVISION, TRAJECTORIES
from memdlm_dist.models.context_parallel import Method
from memdlm_dist.models.llada import RopeScaling


def _one_of(names: Iterable[str]) -> Any:
    """The type of a choice among the entries of a table, so that a new entry is a new choice at once."""
    return Literal[tuple(names)]


@dataclass
class Model(TitanModel):
    """torchtitan's section and the extension to longer sequences."""

    rope_scaling: float = 1.0
    """By what factor the context is extended beyond the one that the backbone's weights were trained on; the base of
    its rotary positions is raised accordingly."""

    rope_scaling_method: RopeScaling = "diffusion_ntk"
    """How. ntk: theta * factor^(d / (d - 2)) with d dimensions a head, as for causal models; diffusion_ntk goes by the
    distances to both sides that a bidirectional model has learnt (arXiv 2510.10481)."""


@dataclass
class Parallelism(TitanParallelism):
    """torchtitan's section with one default changed and one key more."""

    context_parallel_method: Method = "ulysses"
    """How tokens attend to those of other ranks with context_parallel_degree > 1. ulysses exchanges tokens for heads,
    which the degree times tensor_parallel_degree must divide; ring is torch's ring attention, for CUDA and whole rows
    without documents."""

    context_parallel_load_balancer: str | None = None
    """Unused: attention is not causal, so that every rank has the same work."""


@dataclass
class Diffusion:
    """The masked-diffusion objective."""

    schedule: _one_of(SCHEDULES) = "linear"  # type: ignore[valid-type]
    """Noise schedule alpha(t): linear is 1 - t, cosine is 1 - cos(pi/2 (1 - t))."""

    loss_weight: _one_of(WEIGHTS) = "schedule"  # type: ignore[valid-type]
    """Weight of a masked token: schedule is -alpha'(t) / (1 - alpha(t)), the likelihood bound; uniform is 1."""


@dataclass
class ParametricMemory:
    """MemDLM: the inner loop that writes fast weights along a simulated denoising trajectory."""

    enable: bool = True
    """Train with the parametric memory; false is plain masked diffusion."""

    start_step: int = 1
    """First step that trains with the memory; earlier ones are plain masked diffusion. A model trained from
    scratch should first learn without it: the inner loop assumes a base that predicts."""

    probability: float = 1.0
    """Share of the sequences that train with the memory, drawn for each anew (for each step, with granularity batch);
    the others are plain masked diffusion. Below 1 it keeps the base from leaning on fast weights."""

    trajectory: _one_of(TRAJECTORIES) = "anchor_consistent"  # type: ignore[valid-type]
    """States that the inner loop visits. anchor_consistent: from the pre-anchor down to the anchor, the state of
    the outer loss; pre_anchor_only and anchor_only: one step on the first or the last of these; progressive: mask
    ratios from 0.8 to 0.2 that ignore the anchor."""

    inner_steps: int = 2
    """Number of inner steps K of the anchor_consistent and progressive trajectories. With 1 the first visits the
    pre-anchor alone, the second a state at ratio 0.2."""

    pre_anchor_scale: float = 1.5
    """The pre-anchor masks this many times the anchor's ratio of tokens, at most all of them."""

    inner_loss: _one_of(INNER_LOSSES) = "cross_entropy"  # type: ignore[valid-type]
    """What an inner step minimises. cross_entropy: to the clean tokens. The others distil from a teacher, the same
    model with the current fast weights on the next state (the clean sequence at the last step): kl is
    KL(teacher || student), reverse_kl the other way round, hidden_mse and hidden_cosine compare the last layer's
    outputs."""

    student_hidden: Hidden = "pre_final_norm"
    """Which output of the last layer hidden_mse and hidden_cosine take of the student."""

    teacher_hidden: Hidden = "post_final_norm"
    """Which output of the last layer hidden_mse and hidden_cosine take of the teacher."""

    supervision: _one_of(SUPERVISION) = "masked"  # type: ignore[valid-type]
    """Tokens that an inner step scores: all that its state masks, or only those that the next state reveals."""

    learning_rate: float = 0.1
    """Learning rate of the inner SGD."""

    gradient_clip: float = 1.0
    """Largest norm of an inner gradient; 0 switches clipping off."""

    gradient_norm: _one_of(GRADIENT_NORMS) = "per_parameter"  # type: ignore[valid-type]
    """What is clipped: every fast tensor's gradient by its own norm, or all of a set's by their common norm."""

    adapter: _one_of(ADAPTERS) = "lora"  # type: ignore[valid-type]
    """Form of the fast weights of a linear: a low-rank pair, or one matrix of the linear's own size, which costs
    its memory once per set."""

    rank: int = 32
    """Rank of the low-rank pair."""

    alpha: float = 64.0
    """The low-rank term is multiplied by alpha / rank."""

    layer_fraction: float = 0.1
    """Fast weights go to layers int(n (1 - layer_fraction)) .. n - 1."""

    target_modules: list[str] = field(default_factory=lambda: ["ffn"])
    """Linears of those layers that get fast weights: ffn (which is gate, up, down), attention (q, k, v, o), or any
    of these linears by name."""

    granularity: Literal["sample", "batch"] = "sample"
    """One set of fast weights per sequence, or one per local micro-batch (as in the published code)."""


@dataclass
class Lora:
    """Outer LoRA, with model.converters = ["lora"]: the base is frozen and adapters of its linears are trained."""

    rank: int = 32
    """Rank of the adapters."""

    alpha: float = 64.0
    """The adapter's term is multiplied by alpha / rank."""

    target_modules: list[str] = field(default_factory=lambda: ["attention", "ffn"])
    """Linears of all layers that get an adapter: ffn (which is gate, up, down), attention (q, k, v, o), or any of
    these linears by name. In llada_moe ffn gives each expert's linears adapters of their own."""

    export: Literal["merged", "adapter"] = "merged"
    """What the last save writes with checkpoint.last_save_in_hf: the whole model with the adapters merged into it, or
    the adapters alone in PEFT's layout."""


@dataclass
class Data:
    """Streams of tokenised shards, as tools/prepare_data.py writes them."""

    train: list[str] = field(default_factory=list)
    """Folders or URLs of training shards, several to mix (s3://, gs://, ... are cached in cache_folder)."""

    proportions: list[float] = field(default_factory=list)
    """Share of each training stream in an epoch, in the order of `train`; empty takes each stream once."""

    validation: list[str] = field(default_factory=list)
    """Folders or URLs of held-out shards."""

    cache_folder: str = "./outputs/cache"
    """Where shards of remote streams are kept on each node."""

    cache_limit: str = ""
    """Largest size of the cache, such as 200gb; empty for no limit."""

    shuffle: bool = True
    """Shuffle the samples anew every epoch."""

    shuffle_seed: int = 9176
    """Seed of the shuffle."""

    num_canonical_nodes: int = 1
    """Independent paths through the shards. With 1 the order does not depend on the number of ranks."""

    validate_hash: str = "xxh64"
    """Checksum that each shard must match when it is first read; empty to skip the check."""

    download_retry: int = 6
    """How often to try a download, with waits of 1, 2, 4, ... seconds between: 6 bridge half a minute."""

    download_timeout: float = 60.0
    """Seconds that one download may take."""


@dataclass
class Checkpoint(TitanCheckpoint):
    """torchtitan's section with one default changed and two keys more; `folder` may be a URL (s3://bucket/run)."""

    last_save_model_only: bool = False
    """Save only the model at the last step. False, unlike in torchtitan: a finished run can then be continued."""

    keep_every: int = 0
    """Besides the latest checkpoints, keep those whose step is a multiple of this; 0 for none."""

    accept_changes: list[str] = field(default_factory=list)
    """Differences between the checkpoint's run and this one that are meant, such as training.global_batch_size or
    data.train; any other stops the run, for it would not continue the one that was interrupted."""


@dataclass
class Reliability:
    """What happens when something goes wrong."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a batch whose loss or gradient is not finite leads to: the run stops, or the batch changes nothing and is
    counted (reliability/skipped_batches)."""

    max_consecutive_skips: int = 10
    """So many batches skipped in a row stop the run all the same: the model itself is not finite then."""

    on_save_failure: Literal["continue", "stop"] = "continue"
    """What a checkpoint that cannot be saved leads to (a full disk, say): the next interval tries again, or the run
    stops. Earlier checkpoints are left as they are."""


@dataclass
class Validation(TitanValidation):
    """torchtitan's section with two defaults changed; its dataset keys are not used (see [data])."""

    local_batch_size: int = 0
    """Sequences per rank and forward pass; 0 takes training.local_batch_size."""

    seq_len: int = 0
    """Unused: the held-out shards' own length, which must be training.seq_len."""


@dataclass
class JobConfig(TitanJobConfig):
    """torchtitan's JobConfig and our sections."""

    diffusion: Diffusion = field(default_factory=Diffusion)
    parametric_memory: ParametricMemory = field(default_factory=ParametricMemory)
    lora: Lora = field(default_factory=Lora)
    model: Model = field(default_factory=Model)
    parallelism: Parallelism = field(default_factory=Parallelism)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    reliability: Reliability = field(default_factory=Reliability)
    validation: Validation = field(default_factory=Validation)
