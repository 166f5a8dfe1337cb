"""Ranges of the numeric configuration keys, and the error for a value outside its range."""

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from memdlm_dist.config import ranges
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.config.ranges import RANGES
from memdlm_dist.errors import UserError

# torchtitan keys that this project ignores or restricts to one value (see `parse_config`), and lists.
WITHOUT_RANGE = (
    "parallelism.pipeline_parallel_", "fault_tolerance.", "validation.seq_len", "data.proportions",
    "validation.tasks_lengths",
)  # fmt: skip


def numeric_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for field in fields(cls):
        if is_dataclass(field.type):
            keys += numeric_keys(field.type, f"{prefix}{field.name}.")
        elif {field.type, *get_args(field.type)} & {int, float}:
            keys.append(prefix + field.name)
    return keys


def test_every_number_has_a_range():
    every = [name for name in numeric_keys(JobConfig) if not name.startswith(WITHOUT_RANGE)]
    assert len(every) > 50 and sorted(every) == sorted(RANGES)
    ranges.check(JobConfig())


def values_outside(key: str) -> list[float]:
    """Return values just outside a key's range, and NaN."""
    limits = RANGES[key]
    values = [limits.low if limits.above else limits.low - 1]
    values += [] if limits.high == float("inf") else [limits.high if limits.below else limits.high * 2]
    return [value for value in values if value not in (limits.special or {})] + [float("nan")]


@pytest.mark.parametrize("key", RANGES)
def test_what_is_outside_is_said(key):
    for value in values_outside(key):
        config = JobConfig()
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
        with pytest.raises(UserError, match=rf"^{key} must be (at least|above) .*, but is {value}"):
            ranges.check(config)


def test_what_means_something_besides():
    config = JobConfig()
    config.checkpoint.keep_latest_k, config.training.max_norm, config.validation.steps = 0, float("inf"), -1
    ranges.check(config)
    for one in (-1, -2, 1):
        config.checkpoint.keep_latest_k = one
        with pytest.raises(UserError, match=rf"must be at least 2, or 0 \(keep all\), but is {one}; with 1 the only"):
            ranges.check(config)
