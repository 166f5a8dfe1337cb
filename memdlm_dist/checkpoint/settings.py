"""The [checkpoint] section."""

from dataclasses import dataclass, field

from torchtitan.config.job_config import Checkpoint as TitanCheckpoint


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
