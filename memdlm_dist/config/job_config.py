"""Configuration: torchtitan's JobConfig with MemDLM's TOML sections.

Sections that a lower room reads are defined in that room and imported here. `--help` prints the docstrings of the
fields. The method's default values come from `method/`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtitan.config.job_config import Job as TitanJob
from torchtitan.config.job_config import JobConfig as TitanJobConfig
from torchtitan.config.job_config import LRScheduler as TitanLRScheduler
from torchtitan.config.job_config import Model as TitanModel
from torchtitan.config.job_config import Training as TitanTraining
from torchtitan.config.job_config import Validation as TitanValidation

from memdlm_dist.checkpoint.manager import Checkpoint
from memdlm_dist.data.settings import Data
from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.diffusion import LOSS_NORMS, SCHEDULES, WEIGHTS
from memdlm_dist.method.fast_weights import FAST_WEIGHT_TYPES
from memdlm_dist.method.inner_loss import INNER_LOSSES, Hidden
from memdlm_dist.method.inner_sgd import GRADIENT_NORMS, LEARNING_RATE_SCALES, InnerSGD
from memdlm_dist.method.trajectory import SUPERVISION, TRAJECTORIES, Plan
from memdlm_dist.models.layout import Parallelism
from memdlm_dist.models.lora import LoRA
from memdlm_dist.models.rope import RopeScaling


def _one_of(names: Iterable[str]) -> Any:
    """Return a Literal of the names in a table, so that a new entry of the table is a valid value."""
    return Literal[tuple(names)]


# Format of TOML files, increased when a key of an older file changes its meaning. docs/changes.md has the history.
FORMAT = 1


@dataclass
class Job(TitanJob):
    """torchtitan's [job] section with the format of the TOML file."""

    format: int = FORMAT
    """Format of the TOML file; a format newer than this version is an error."""


@dataclass
class Model(TitanModel):
    """torchtitan's [model] section with context extension."""

    rope_scaling: float = 1.0
    """Context length as a multiple of the pretrained one; the RoPE base is rescaled for it."""

    rope_scaling_method: RopeScaling = "diffusion_ntk"
    """Method that rescales the RoPE base theta. ntk: theta * factor^(d / (d - 2)) with head dim d, as for causal
    models; diffusion_ntk: computed from the distances in both directions that a bidirectional model has learnt
    (arXiv 2510.10481)."""

    load_balance_coeff: float | None = None
    """Change of the router's bias of every expert in each step, up or down towards a balanced load (arXiv 2408.15664),
    for backbones whose router has a bias; not set: the bias keeps its value."""


@dataclass
class Diffusion:
    """Masked-diffusion objective."""

    schedule: _one_of(SCHEDULES) = Plan.schedule  # type: ignore[valid-type]
    """Noise schedule alpha(t), linear: 1 - t; cosine: 1 - cos(pi/2 (1 - t))."""

    loss_weight: _one_of(WEIGHTS) = Plan.loss_weight  # type: ignore[valid-type]
    """Loss weight of a masked token, schedule: -alpha'(t) / (1 - alpha(t)), the likelihood bound; uniform: 1."""

    loss_norm: _one_of(LOSS_NORMS) = "token"  # type: ignore[valid-type]
    """Normalisation of the training loss. token: the loss sum of the global batch divided by its number of maskable
    tokens; answer: the loss sum of each sample (a row, or a packed document) divided by the sample's own number of
    maskable tokens, averaged over samples; sequence: the loss sum of the global batch divided by its number of
    samples. Samples without a maskable token do not count. Validation always reports losses per token."""

    label_smoothing: float = 0.0
    """Share e of a masked token's target that is spread evenly over the vocabulary in the training loss; 0: none. The
    token's loss is (1 - e) (-log p(label)) + e mean(-log p). Inner losses and validation smooth nothing."""


@dataclass
class ParametricMemory:
    """MemDLM's parametric memory: an inner loop that adapts fast weights along a simulated denoising trajectory."""

    enable: bool = True
    """Training with the parametric memory; false: plain masked diffusion."""

    start_step: int = 1
    """First step that trains with the memory; earlier steps are plain masked diffusion. A model trained from scratch
    should first learn without the memory: the inner loop assumes a base that already predicts."""

    probability: float = 1.0
    """Probability that a sample, or a step, trains with the memory; the rest is plain masked diffusion, without the
    cost of the inner loop. Values below 1 keep the base from depending on fast weights."""

    probability_unit: Literal["sample", "step"] = "sample"
    """Unit of the draw with `probability`. sample: each set of fast weights is drawn for itself, and the slowest rank
    decides the time of a step; step: all samples of a step train with the memory, or none (always with granularity
    batch)."""

    trajectory: _one_of(TRAJECTORIES) = Plan.trajectory  # type: ignore[valid-type]
    """States that the inner loop visits. anchor_consistent: from the pre-anchor to the anchor, which is the state of
    the outer loss; pre_anchor_only and anchor_only: a single step on that state; progressive: mask ratios from 0.8 to
    progressive_end, independent of the anchor."""

    inner_steps: int = Plan.inner_steps
    """Number of inner steps K in the anchor_consistent and progressive trajectories. With K = 1 anchor_consistent
    visits only the pre-anchor and progressive only a state with the mask ratio progressive_end."""

    inner_epochs: int = Memory.inner_epochs
    """Number of times that the inner loop goes through its states, in order and with the same fast weights."""

    pre_anchor_scale: float = Plan.pre_anchor_scale
    """Mask ratio of the pre-anchor as a multiple of the anchor's; at most all maskable tokens are masked."""

    progressive_end: float = Plan.progressive_end
    """Last mask ratio of the progressive trajectory; the first is 0.8."""

    inner_loss: _one_of(INNER_LOSSES) = "cross_entropy"  # type: ignore[valid-type]
    """Loss of an inner step. cross_entropy: against the clean tokens. The other losses distil from a teacher, which is
    the same model with the current fast weights on the next state (at the last step on the clean sequence).
    kl: KL(teacher || student); reverse_kl: KL(student || teacher); hidden_mse and hidden_cosine: distance between
    the last layer's outputs."""

    distillation_temperature: float = 1.0
    """Temperature T of kl and reverse_kl: they compare the predictions softmax(logits / T) of student and teacher, and
    are multiplied by T^2, so that the size of the gradient depends little on T."""

    student_hidden: Hidden = "pre_final_norm"
    """Output of the student's last layer in hidden_mse and hidden_cosine: before or after the final norm."""

    teacher_hidden: Hidden = "post_final_norm"
    """Output of the teacher's last layer in hidden_mse and hidden_cosine: before or after the final norm."""

    supervision: _one_of(SUPERVISION) = Plan.supervision  # type: ignore[valid-type]
    """Tokens that an inner step scores. masked: all masked tokens of its state; newly_revealed: only the masked tokens
    that the next state reveals; anchor: only its masked tokens that the anchor masks as well, which are all tokens of
    the anchor unless the trajectory is progressive."""

    learning_rate: float = InnerSGD.learning_rate
    """Learning rate of the inner loop's SGD."""

    learning_rate_scale: _one_of(LEARNING_RATE_SCALES) = InnerSGD.learning_rate_scale  # type: ignore[valid-type]
    """Factors of learning_rate for lora fast weights. width: with w the width of the backbone, sqrt(2048 / w) for A and
    sqrt(w / 2048) for B. Clipped steps then change the linears' outputs by the same share at every width. At 2048, the
    width of the paper's backbones, both factors are 1. none: 1 at every width, as published."""

    gradient_clip: float = InnerSGD.clip
    """Maximum norm of an inner gradient; 0: no clipping."""

    gradient_norm: _one_of(GRADIENT_NORMS) = InnerSGD.gradient_norm  # type: ignore[valid-type]
    """Norm that gradient_clip limits. per_parameter: the norm of each fast tensor's gradient; global: the common norm
    of all gradients in a set of fast weights."""

    adapter: _one_of(FAST_WEIGHT_TYPES) = "lora"  # type: ignore[valid-type]
    """Type of the fast weights of a linear. lora: a low-rank pair of matrices; full: one matrix of the linear's size
    for each set of fast weights, with the memory cost of that size."""

    rank: int = 32
    """Rank of lora fast weights."""

    alpha: float = 64.0
    """Scaling of lora fast weights: their term is multiplied by alpha / rank."""

    dropout: float = 0.0
    """Probability that training drops an input feature of the fast weights' terms (0: no dropout), in steps of
    1/65,536. All passes of a step share the masks. Validation and inference drop nothing."""

    layer_fraction: float = 0.1
    """Fraction of the n layers, counted from the last, with fast weights: int(n (1 - layer_fraction)) to n - 1."""

    target_modules: list[str] = field(default_factory=lambda: ["ffn"])
    """Linears that get fast weights: ffn (gate, up, down), attention (q, k, v, o), or single linears by name."""

    granularity: Literal["sample", "batch"] = "sample"
    """Scope of a set of fast weights. sample: samples_per_set samples; batch: one set per micro-batch, as in the
    published code, where a micro-batch has 2 rows on 1 rank."""

    samples_per_set: int = 1
    """Number of consecutive rows of the global batch that share a set of fast weights, on any layout; it divides the
    rows of a micro-batch. In packed rows: number of consecutive documents of a row that share a set; the last set of a
    row may have fewer."""

    @property
    def group_size(self) -> int:
        """Number of consecutive samples that a micro-batch must hold together; 1 without memory."""
        return self.samples_per_set if self.enable else 1


@dataclass
class Training(TitanTraining):
    """torchtitan's [training] section with a length in epochs and a local batch size derived from the global one."""

    epochs: float = 0.0
    """Length of the run in epochs of the training data, instead of steps: epochs x (rows // global_batch_size) steps,
    rounded up. 0: the length is training.steps."""

    local_batch_size: int = 8
    """Rows per data-parallel rank and micro-batch. -1: the rank's share of global_batch_size, or the share's largest
    divisor up to max_local_batch_size (if one fits, a multiple of parametric_memory.samples_per_set), with gradient
    accumulation for the rest."""

    max_local_batch_size: int = 0
    """Upper limit of a local batch size that is derived with local_batch_size = -1; 0: no limit."""


@dataclass
class LRScheduler(TitanLRScheduler):
    """torchtitan's [lr_scheduler] section with a warm-up given as a share of the schedule."""

    warmup_ratio: float | None = None
    """Warm-up as a share of the schedule's steps (total_steps, by default the run's length), rounded up, instead of
    warmup_steps. Without a decay_ratio, the decay begins right after the warm-up."""


@dataclass
class Reliability:
    """Reaction to non-finite steps and failed saves."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a batch with a non-finite loss or gradient. stop: end the run; skip: leave weights and optimizer
    state unchanged and count the batch (reliability/skipped_batches)."""

    max_consecutive_skips: int = 10
    """Number of consecutive skipped batches that ends the run even with on_nonfinite = "skip", because the model itself
    is then not finite."""

    on_save_failure: Literal["continue", "stop"] = "continue"
    """Reaction to a checkpoint that cannot be saved (for example on a full disk). continue: try again at the next
    interval; stop: end the run. Earlier checkpoints stay unchanged."""


@dataclass
class Validation(TitanValidation):
    """torchtitan's [validation] section with two other defaults; [data] replaces its dataset keys."""

    local_batch_size: int = 0
    """Rows per data-parallel rank and forward pass; 0: training.local_batch_size."""

    seq_len: int = 0
    """Unused key: the held-out shards have rows of training.seq_len tokens."""

    tasks: list[str] = field(default_factory=list)
    """Needle tasks that the model answers during training, such as ["multi_value", "facts_1"] (docs/evaluation.md)."""

    tasks_freq: int = 0
    """Steps between two validations with tasks; 0: validation.freq."""

    tasks_lengths: list[int] = field(default_factory=list)
    """Tokens of question and true answer; empty: training.seq_len less tasks_new_tokens, which is the largest."""

    tasks_samples: int = 16
    """Questions of each task at each length; the same at every validation."""

    tasks_new_tokens: int = 32
    """Tokens of each answer, decoded one a step in blocks of 32."""

    tasks_sizes: list[str] = field(default_factory=list)
    """Sizes of the tasks, such as ["values=2", "common=5"]; RULER's by default, which need 2,000 tokens or so."""

    def __post_init__(self) -> None:
        """Skip torchtitan's check of `steps`: `ranges` checks it and names the key."""


@dataclass
class JobConfig(TitanJobConfig):
    """torchtitan's JobConfig with MemDLM's sections."""

    job: Job = field(default_factory=Job)
    diffusion: Diffusion = field(default_factory=Diffusion)
    parametric_memory: ParametricMemory = field(default_factory=ParametricMemory)
    lora: LoRA = field(default_factory=LoRA)
    model: Model = field(default_factory=Model)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    data: Data = field(default_factory=Data)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    reliability: Reliability = field(default_factory=Reliability)
    validation: Validation = field(default_factory=Validation)
