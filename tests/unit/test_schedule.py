"""Length of a run in epochs, and warm-up as a share of the schedule."""

import logging

import pytest

from memdlm_dist.config import parse_config, schedule
from memdlm_dist.config.experiment import get_experiment
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError

EPOCH = 61  # steps


def resolved(epochs=0.0, ratio=None, total=None, steps=10, warmup=2):
    config = JobConfig()
    config.training.steps, config.training.epochs, config.training.global_batch_size = steps, epochs, 4
    scheduler = config.lr_scheduler
    scheduler.warmup_steps, scheduler.warmup_ratio, scheduler.total_steps = warmup, ratio, total
    schedule.resolve(config, EPOCH)
    return config


@pytest.mark.parametrize(
    "written, steps, warmup",
    [
        ({}, 10, 2),
        ({"epochs": 3}, 183, 2),
        ({"epochs": 0.01}, 1, 1),  # the default warm-up of 2 steps is longer than the run
        ({"epochs": 2.5, "ratio": 0.1}, 153, 16),
        ({"ratio": 0.25}, 10, 3),
        ({"ratio": 0.0}, 10, 0),
        ({"ratio": 0.03, "total": 1000}, 10, 30),
        ({"epochs": 2, "ratio": 1.0, "total": 50}, 122, 50),
    ],
)
def test_epochs_and_ratios_are_rounded_up_to_steps(written, steps, warmup):
    """The formulas of Hugging Face's trainer: ceil(epochs * steps per epoch), ceil(ratio * total)."""
    config = resolved(**written)
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (steps, warmup)


def test_the_log_has_the_steps(caplog):
    caplog.set_level(logging.INFO)
    resolved()
    assert not caplog.messages
    resolved(epochs=30, ratio=0.1)
    assert caplog.messages == [
        "training.epochs = 30 is 1,830 steps of 4 rows (61 an epoch); lr_scheduler.warmup_ratio = 0.1 is 183 of 1,830 "
        "steps."
    ]


def test_steps_and_epochs_exclude_each_other(tmp_path):
    file = tmp_path / "epochs.toml"
    written = '[training]\nepochs = 3\n{}[data]\ntrain = ["x"]\n[lr_scheduler]\nwarmup_ratio = 0.1\n{}'

    def parse(*flags, lines=("", "")):
        file.write_text(written.format(*lines))
        return parse_config.parse(["--job.config_file", str(file), *flags])

    for flags, expected in (
        (["--training.epochs", "0.5"], (0.5, 0.1, 10000)),
        (["--training.epochs", "0", "--training.steps", "5"], (0, 0.1, 5)),
        (["--training.steps=5", "--lr-scheduler.warmup-steps", "1"], (0, None, 5)),
    ):
        config = parse(*flags)
        assert (config.training.epochs, config.lr_scheduler.warmup_ratio, config.training.steps) == expected
    length, warmup = "training.steps and training.epochs", "lr_scheduler.warmup_steps and lr_scheduler.warmup_ratio"
    for flags, lines, pair, place in (
        (["--training.epochs", "1", "--training.steps", "5"], ("", ""), length, "the flags"),
        (["--lr_scheduler.warmup_ratio", "0", "--lr_scheduler.warmup_steps", "1"], ("", ""), warmup, "the flags"),
        ([], ("steps = 5\n", ""), length, "the TOML file"),
        ([], ("", "warmup_steps = 1\n"), warmup, "the TOML file"),
    ):
        with pytest.raises(UserError, match=f"^{pair} are both set in {place}, but only one can count; remove one.$"):
            parse(*flags, lines=lines)


def test_a_checkpoint_records_the_length_unless_the_schedule_has_its_own():
    three = get_experiment(resolved(epochs=3, ratio=0.1))
    assert three["training.epochs"] == 3 and three["lr_scheduler.total_steps"] == 183
    assert three["lr_scheduler.warmup_steps"] == 19 and "lr_scheduler.warmup_ratio" not in three
    in_steps = get_experiment(resolved(steps=183, warmup=19))
    assert in_steps == {key: value for key, value in three.items() if key != "training.epochs"}
    own = [get_experiment(resolved(epochs=epochs, total=183)) for epochs in (0, 3, 5)]
    assert own[0] == own[1] == own[2] and own[0]["lr_scheduler.total_steps"] == 183
