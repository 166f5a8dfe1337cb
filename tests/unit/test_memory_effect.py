"""Scalars of the memory's effect: -log p of the anchor's tokens, and the relative write."""

import pytest
import torch

from memdlm_dist.method.bilevel import outer_loss
from memdlm_dist.training.metrics import ANCHOR_NLL, RELATIVE_WRITE, _memory_line
from tests.support.bilevel import build, data, memory, objective, recorder

STEP = 3
SHARED = {"samples_per_set": 2, "targets": ("ffn", "attention")}


def effect(model, goal, groups=None, parts=1):
    """Return the scalars after micro-batches with equal shares of the rows, `groups` of which train with the memory."""
    metrics = recorder()
    for tokens, labels, ids in zip(*(x.chunk(parts) for x in data(rows=8)), strict=True):
        batch = goal.micro_batch(tokens, labels, ids, STEP, adapted_groups=groups)
        metrics.record_inner_loop(goal.loss_sum(model, batch, STEP, measures=True)[1])
    return metrics._memory_effect()


def test_before_the_inner_loop_the_memory_changes_nothing():
    """The scalar is the loss with the memory off, unweighted, of the samples that train with the memory."""
    model, goal = build(torch.float32), objective(memory(**SHARED))
    for groups, rows in ((None, 8), (1, 2), (3, 6)):
        batch = goal.micro_batch(*(x[:rows] for x in data(rows=8)), STEP, outer_weight="uniform")
        loss, _ = outer_loss(model, batch, None)
        scalars = effect(model, goal, groups)
        before, after = (scalars[ANCHOR_NLL.format(name)] for name in ("before", "after"))
        # float32, other shapes of products.
        assert before == pytest.approx(loss.item() / int(batch.masked), rel=1e-5) and after < before - 1e-3


@pytest.mark.parametrize("groups", [None, 1])
def test_accumulation_gives_the_scalars_of_one_micro_batch(groups):
    model, goal = build(torch.float32), objective(memory(**SHARED))
    once, twice = effect(model, goal, None if groups is None else 2 * groups), effect(model, goal, groups, parts=2)
    if groups is not None:  # rows 0, 1, 4 and 5; `adapted_groups` are the first ones of a micro-batch
        order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
        metrics = recorder()
        batch = goal.micro_batch(*(x[order] for x in data(rows=8)), STEP, adapted_groups=2 * groups)
        metrics.record_inner_loop(goal.loss_sum(model, batch, STEP, measures=True)[1])
        once = metrics._memory_effect()
    assert twice == pytest.approx(once, rel=1e-5) and once[RELATIVE_WRITE] > 1e-3


@pytest.mark.parametrize("loss, steps", [("cross_entropy", 2), ("cross_entropy", 3), ("kl", 2)])
def test_a_rank_without_a_chosen_sample_has_the_same_scalars(loss, steps):
    """Otherwise ranks would reduce tensors of different shapes."""
    model, goal = build(torch.float32), objective(memory(loss=loss, inner_epochs=2), inner_steps=steps)
    records = []
    for groups in (0, 1):
        metrics = recorder()
        batch = goal.micro_batch(*data(), STEP, adapted_groups=groups)
        assert bool(batch.inner) == (groups > 0)
        metrics.record_inner_loop(goal.loss_sum(model, batch, STEP, measures=True)[1])
        records.append((list(metrics._sums), list(metrics._anchor_nll), metrics._write_X2.shape))
        values = metrics._memory_effect().values()
        assert all(value > 0 for value in values) if groups else not any(values)
    assert records[0] == records[1]
    read = [] if loss == "kl" else [f"step_{steps}", f"step_{2 * steps}"]
    assert records[0][1] == [ANCHOR_NLL.format(name) for name in ("before", *read, "after")]


def test_a_step_that_does_not_log_takes_no_pass_more():
    """Measuring takes one more pass through the tail; the relative write none."""
    model, goal = build(torch.float32), objective(memory())
    passes = []
    model.output.register_forward_pre_hook(lambda *_: passes.append(1))
    taken = []
    for measures in (False, True):
        passes.clear()
        _, statistics = goal.loss_sum(model, goal.micro_batch(*data(), STEP), STEP, measures=measures)
        taken.append(len(passes))
        assert statistics.write_X2.min() > 0 and bool(statistics.anchor_nll) == measures
    assert taken == [3, 4]


def test_the_console_line():
    scalars = {f"parametric_memory/inner_loss_step_{k}": 1.0 + k for k in (1, 2)}
    effect = {ANCHOR_NLL.format("before"): 2.5, ANCHOR_NLL.format("after"): 2.25, RELATIVE_WRITE: 0.0314}
    assert _memory_line(scalars | effect, effect) == (
        "  inner loss: 2.0000 -> 3.0000  anchor nll: 2.5000 -> 2.2500  write: 3.14%"
    )
    assert _memory_line({"grad_norm": 1.0}, {}) == ""
