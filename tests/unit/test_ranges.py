"""The numbers of a configuration: each has a range, and what is outside of it is one sentence."""

from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from memdlm_dist.config import ranges
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.config.ranges import RANGES
from memdlm_dist.errors import UserError

# Sections and keys of torchtitan's that nothing here reads, or that take one value alone (see `parse_config`).
ELSEWHERE = ("parallelism.pipeline_parallel_", "fault_tolerance.", "validation.seq_len", "data.proportions")


def numbers(cls: type, prefix: str = "") -> list[str]:
    found = []
    for each in fields(cls):
        if is_dataclass(each.type):
            found += numbers(each.type, f"{prefix}{each.name}.")
        elif {each.type, *get_args(each.type)} & {int, float}:
            found.append(prefix + each.name)
    return found


def test_every_number_has_a_range():
    every = [name for name in numbers(JobConfig) if not name.startswith(ELSEWHERE)]
    assert len(every) > 50 and sorted(every) == sorted(RANGES)
    ranges.check(JobConfig())


def outside(key: str) -> list[float]:
    """Values just outside of a range."""
    found = RANGES[key]
    values = [found.low if found.above else found.low - 1]
    values += [] if found.high == float("inf") else [found.high if found.below else found.high * 2]
    return [value for value in values if value not in (found.special or {})] + [float("nan")]


@pytest.mark.parametrize("key", RANGES)
def test_what_is_outside_is_said(key):
    for value in outside(key):
        config = JobConfig()
        *sections, name = key.split(".")
        section = config
        for each in sections:
            section = getattr(section, each)
        setattr(section, name, value)
        with pytest.raises(UserError, match=rf"^{key} must be (at least|above) .*, but is {value}"):
            ranges.check(config)


def test_what_means_something_besides():
    config = JobConfig()
    config.checkpoint.keep_latest_k, config.training.max_norm, config.validation.steps = 0, float("inf"), -1
    ranges.check(config)
    for one in (-1, -2, 1):
        config.checkpoint.keep_latest_k = one
        with pytest.raises(UserError, match=rf"must be at least 2, or 0 \(keep all\), but is {one}; with 1 the newest"):
            ranges.check(config)
