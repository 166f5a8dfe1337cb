"""Settings that affect an experiment's outcome, as stored in a checkpoint's run.json."""

from dataclasses import asdict
from typing import Any

from memdlm_dist.config.job_config import JobConfig

_SECTIONS = ("optimizer", "lr_scheduler", "diffusion", "parametric_memory")
_KEYS = {
    "model": ("name", "flavor", "converters", "rope_scaling", "rope_scaling_method", "load_balance_coeff"),
    "training": ("max_norm", "dtype", "mixed_precision_param"),
    "data": ("mask_prompt",),
}
# The schedule depends on warmup_steps, which is set from warmup_ratio.
_WITHOUT_EFFECT = ("optimizer.implementation", "lr_scheduler.warmup_ratio")


def get_length(config: JobConfig) -> dict[str, Any]:
    """Return the length of the run and of its warm-up, as written and in steps, by configuration key."""
    keys = {"training": ("epochs", "steps"), "lr_scheduler": ("warmup_ratio", "warmup_steps", "total_steps")}
    return {f"{name}.{key}": getattr(getattr(config, name), key) for name, section in keys.items() for key in section}


def get_experiment(config: JobConfig) -> dict[str, Any]:
    """Return the settings of optimizer, schedule, objective, memory and backbone, by configuration key.

    The keys of a disabled memory (except `parametric_memory.enable`) and of unused adapters are omitted. The length of
    the run determines the learning-rate decay, unless `lr_scheduler.total_steps` is set.
    """
    sections = [*_SECTIONS, *(["lora"] if config.model.converters else [])]
    values = {f"{name}.{key}": value for name in sections for key, value in asdict(getattr(config, name)).items()}
    values |= {f"{name}.{key}": getattr(getattr(config, name), key) for name, keys in _KEYS.items() for key in keys}
    if not config.lr_scheduler.total_steps:
        values["lr_scheduler.total_steps"] = config.training.steps
        values |= {"training.epochs": config.training.epochs} if config.training.epochs else {}
    if not config.parametric_memory.enable:
        memory = "parametric_memory."
        values = {key: value for key, value in values.items() if not key.startswith(memory) or key == f"{memory}enable"}
    return {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
