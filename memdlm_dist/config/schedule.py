"""Resolution of a run's length and warm-up: from epochs and shares of the schedule to optimizer steps."""

import logging
import math

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.runtime.rank_0 import is_rank_0

logger = logging.getLogger()


def resolve(config: JobConfig, steps_per_epoch: int) -> None:
    """Set `training.steps` from `training.epochs`, and `lr_scheduler.warmup_steps` from `lr_scheduler.warmup_ratio`.

    The configuration changes in place, so that all its readers see the same numbers. Both numbers are rounded up, as
    in Hugging Face's trainer. A key that is not set leaves its number unchanged.

    Args:
        steps_per_epoch: complete global batches in an epoch of the training data.
    """
    training, schedule = config.training, config.lr_scheduler
    resolved = []
    if training.epochs:
        training.steps = math.ceil(training.epochs * steps_per_epoch)
        resolved.append(
            f"training.epochs = {training.epochs:g} is {training.steps:,} steps of {training.global_batch_size:,} rows "
            f"({steps_per_epoch:,} an epoch)"
        )
    total = schedule.total_steps or training.steps
    if schedule.warmup_ratio is not None:
        schedule.warmup_steps = math.ceil(schedule.warmup_ratio * total)
        resolved.append(
            f"lr_scheduler.warmup_ratio = {schedule.warmup_ratio:g} is {schedule.warmup_steps:,} of {total:,} steps"
        )
    elif training.epochs and schedule.warmup_steps > total:
        resolved.append(f"lr_scheduler.warmup_steps = {schedule.warmup_steps:,} is reduced to the {total:,} steps")
        schedule.warmup_steps = total
    if resolved and is_rank_0():
        logger.info(f"{'; '.join(resolved)}.")
