"""Validation: the summary table, the history file, held-out noise and the memory-dependence warning."""

import json

import pytest
import torch

from memdlm_dist import train
from memdlm_dist.training.memory_dependence import MemoryDependence
from memdlm_dist.training.validation_history import HISTORY_FILE, LOSSES, append, history
from memdlm_dist.training.validation_summary import summary_table
from tests.support.bilevel import data, memory, objective
from tests.support.launching import debug, scalars


def write_history(tmp_path, *rows):
    lines = (json.dumps({"step": step, LOSSES[0]: off}) for step, off in rows)
    (tmp_path / HISTORY_FILE).write_text("\n".join(lines) + "\n")


def test_the_table_is_of_the_last_run(tmp_path):
    assert summary_table(str(tmp_path)) is None
    # A long run, a shorter run restarted from step 0 in the same folder, and that run's continuation.
    write_history(tmp_path, (0, 9.0), (100, 5.0), (0, 8.0), (10, 7.0), (10, 7.0), (20, 6.5))
    lines = summary_table(str(tmp_path)).splitlines()
    assert "start (step      0)" in lines[1] and "8.0000" in lines[1] and lines[1].endswith("-")
    assert "end   (step     20)" in lines[2] and "6.5000" in lines[2]


def test_damaged_lines_are_left_out(tmp_path, caplog):
    path = tmp_path / HISTORY_FILE
    path.write_text('{"step": 0, "validation/loss_memory_off": 9.0}\n[1]\n{"step": null}\n{"step": 5, "valid')
    append(path, 10, {LOSSES[0]: 7.0})
    with caplog.at_level("WARNING"):
        assert [row["step"] for row in history(path)] == [0, 10]
    assert "3 damaged lines" in caplog.text
    path.write_text("{")
    assert summary_table(str(tmp_path)) is None


def test_the_bound_has_the_schedules_weights_and_the_inner_loop_its_own():
    uniform = objective(memory(), loss_weight="uniform")
    t = torch.full((4,), 0.5, dtype=torch.float64)
    batch = uniform.micro_batch(*data(), step=0, t_U=t, outer_weight="schedule")
    assert batch.anchor.weight_N.tolist() == pytest.approx([2.0] * len(batch.anchor.weight_N), rel=1e-5)
    assert all((step.scored.weight_N == 1).all() for step in batch.inner)


ANOTHER_LOSS = ("--debug.seed", "8", "--diffusion.loss_weight", "uniform", "--diffusion.loss_norm", "answer")


def test_held_out_noise_does_not_depend_on_the_run(tmp_path, root, monkeypatch):
    """Same weights with another seed and another training loss give the same held-out loss."""
    monkeypatch.chdir(root)
    saved = tmp_path / "seed"
    assert train.main(debug(saved, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")) == 0
    initial_losses = []
    for name, extra in (("a", ()), ("b", ANOTHER_LOSS)):
        load = ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.initial_load_path"]
        run = debug(tmp_path / name, *load, str(saved / "checkpoint/step-0"), "--validation.enable", *extra)
        assert train.main([*run, "--training.steps", "1"]) == 0
        initial_losses.append(scalars(tmp_path / name)[LOSSES[0]][0])
    assert initial_losses[0] == initial_losses[1]


def test_a_base_that_leans_on_its_memory_is_warned_of():
    watch = MemoryDependence()
    assert watch.check(0, 5.0, 5.0) == ""
    assert watch.check(10, 4.0, 3.9) == ""  # both losses fall
    assert watch.check(20, 4.02, 3.0) == ""  # within 1 % of the best
    assert watch.check(30, 4.5, 4.4) == ""  # both losses rise: memory is not the cause
    warning = watch.check(40, 4.5, 3.0)
    assert "from 4.0000 (step 10) to 4.5000" in warning and "from 3.9000 to 3.0000" in warning
    assert "parametric_memory.probability" in warning
    assert watch.check(50, 3.9, 2.0) == ""  # new best loss with memory off
