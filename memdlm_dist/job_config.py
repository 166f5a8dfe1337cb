"""Our TOML sections, which extend torchtitan's JobConfig (`job.custom_config_module`).

Each field's docstring is what `--help` shows. Reading and checking is in `parse_config`.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config.job_config import Checkpoint as TitanCheckpoint
from torchtitan.config.job_config import Validation as TitanValidation


@dataclass
class Diffusion:
    """The masked-diffusion objective."""

    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule alpha(t): linear is 1 - t, cosine is 1 - cos(pi/2 (1 - t))."""

    loss_weight: Literal["schedule", "uniform"] = "schedule"
    """Weight of a masked token: schedule is -alpha'(t) / (1 - alpha(t)), the likelihood bound; uniform is 1."""


@dataclass
class ParametricMemory:
    """MemDLM: the inner loop that writes fast weights along a simulated denoising trajectory."""

    enable: bool = True
    """Train with the parametric memory; false is plain masked diffusion."""

    start_step: int = 1
    """First step that trains with the memory; earlier ones are plain masked diffusion. A model trained from
    scratch should first learn without it: the inner loop assumes a base that predicts."""

    inner_steps: int = 2
    """Number of inner steps K (at least 2): from the pre-anchor to the anchor."""

    pre_anchor_scale: float = 1.5
    """The pre-anchor masks this many times the anchor's ratio of tokens, at most all of them."""

    learning_rate: float = 0.1
    """Learning rate of the inner SGD."""

    gradient_clip: float = 1.0
    """Largest norm of one fast tensor's inner gradient; 0 switches clipping off."""

    rank: int = 32
    """Rank of the fast weights."""

    alpha: float = 64.0
    """The low-rank term is multiplied by alpha / rank."""

    layer_fraction: float = 0.1
    """Fast weights go to layers int(n (1 - layer_fraction)) .. n - 1."""

    target_modules: list[str] = field(default_factory=lambda: ["gate", "up", "down"])
    """Linears of those layers that get fast weights: any of gate, up, down."""

    granularity: Literal["sample", "batch"] = "sample"
    """One set of fast weights per sequence, or one per local micro-batch (as in the published code)."""


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

    download_retry: int = 2
    """How often to retry a download."""

    download_timeout: float = 60.0
    """Seconds that one download may take."""


@dataclass
class Checkpoint(TitanCheckpoint):
    """torchtitan's section with one default changed."""

    last_save_model_only: bool = False
    """Save only the model at the last step. False, unlike in torchtitan: a finished run can then be continued."""


@dataclass
class Validation(TitanValidation):
    """torchtitan's section with two defaults changed; its dataset keys are not used (see [data])."""

    local_batch_size: int = 0
    """Sequences per rank and forward pass; 0 takes training.local_batch_size."""

    seq_len: int = 0
    """Unused: the held-out shards' own length, which must be training.seq_len."""


@dataclass
class JobConfig:
    """What torchtitan's JobConfig is extended by."""

    diffusion: Diffusion = field(default_factory=Diffusion)
    parametric_memory: ParametricMemory = field(default_factory=ParametricMemory)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
