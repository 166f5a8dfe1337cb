"""The configuration: torchtitan's JobConfig and our TOML sections, each beside the code that reads it if that is below.

Each field's docstring is what `--help` shows. The defaults of the method are those of `method/`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtitan.config.job_config import Job as TitanJob
from torchtitan.config.job_config import JobConfig as TitanJobConfig
from torchtitan.config.job_config import Model as TitanModel
from torchtitan.config.job_config import Training as TitanTraining
from torchtitan.config.job_config import Validation as TitanValidation

from memdlm_dist.checkpoint.manager import Checkpoint
from memdlm_dist.data.settings import Data
from memdlm_dist.method.diffusion import SCHEDULES, WEIGHTS
from memdlm_dist.method.fast_weights import FAST_WEIGHT_TYPES
from memdlm_dist.method.inner_loss import INNER_LOSSES, Hidden
from memdlm_dist.method.inner_sgd import GRADIENT_NORMS, InnerSGD
from memdlm_dist.method.trajectory import SUPERVISION, TRAJECTORIES, Plan
from memdlm_dist.models.layout import Parallelism
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.rope import RopeScaling


def _one_of(names: Iterable[str]) -> Any:
    """The type of a choice among the entries of a table, so that a new entry is a new choice at once."""
    return Literal[tuple(names)]


# Of TOML files: raised when a key of an older file means something else. docs/changes.md has the history.
FORMAT = 1


@dataclass
class Job(TitanJob):
    """torchtitan's section and the format of the file."""

    format: int = FORMAT
    """Format of the TOML file; a later one than this version knows is refused."""


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
class Diffusion:
    """The masked-diffusion objective."""

    schedule: _one_of(SCHEDULES) = Plan.schedule  # type: ignore[valid-type]
    """Noise schedule alpha(t): linear is 1 - t, cosine is 1 - cos(pi/2 (1 - t))."""

    loss_weight: _one_of(WEIGHTS) = Plan.loss_weight  # type: ignore[valid-type]
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

    trajectory: _one_of(TRAJECTORIES) = Plan.trajectory  # type: ignore[valid-type]
    """States that the inner loop visits. anchor_consistent: from the pre-anchor down to the anchor, the state of
    the outer loss; pre_anchor_only and anchor_only: one step on the first or the last of these; progressive: mask
    ratios from 0.8 to 0.2 that ignore the anchor."""

    inner_steps: int = Plan.inner_steps
    """Number of inner steps K of the anchor_consistent and progressive trajectories. With 1 the first visits the
    pre-anchor alone, the second a state at ratio 0.2."""

    pre_anchor_scale: float = Plan.pre_anchor_scale
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

    supervision: _one_of(SUPERVISION) = Plan.supervision  # type: ignore[valid-type]
    """Tokens that an inner step scores: all that its state masks, or only those that the next state reveals."""

    learning_rate: float = InnerSGD.learning_rate
    """Learning rate of the inner SGD."""

    gradient_clip: float = InnerSGD.clip
    """Largest norm of an inner gradient; 0 switches clipping off."""

    gradient_norm: _one_of(GRADIENT_NORMS) = InnerSGD.gradient_norm  # type: ignore[valid-type]
    """What is clipped: every fast tensor's gradient by its own norm, or all of a set's by their common norm."""

    adapter: _one_of(FAST_WEIGHT_TYPES) = "lora"  # type: ignore[valid-type]
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
class Training(TitanTraining):
    """torchtitan's section and a local batch size that follows from the global one."""

    local_batch_size: int = 8
    """Sequences per rank and forward pass. -1: this data-parallel rank's share of global_batch_size, or its largest
    divisor that max_local_batch_size allows; the rest is gradient accumulation."""

    max_local_batch_size: int = 0
    """Largest local batch size that -1 chooses; 0: no limit."""


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

    def __post_init__(self) -> None:
        """Leave the check of `steps` to `ranges`, which names the key."""


@dataclass
class JobConfig(TitanJobConfig):
    """torchtitan's JobConfig and our sections."""

    job: Job = field(default_factory=Job)
    diffusion: Diffusion = field(default_factory=Diffusion)
    parametric_memory: ParametricMemory = field(default_factory=ParametricMemory)
    lora: LoRA = field(default_factory=LoRA)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    reliability: Reliability = field(default_factory=Reliability)
    validation: Validation = field(default_factory=Validation)
