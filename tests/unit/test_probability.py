"""parametric_memory.probability: the share of samples that adapt; the rest train as plain masked diffusion."""

from dataclasses import replace

import pytest
import torch

from memdlm_dist.method import fast_weights
from memdlm_dist.method.bilevel import outer_loss
from tests.support.bilevel import build, memory, objective


def rows(count, length=16, first=0):
    tokens = torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.clone(), torch.arange(first, first + count)


def adapted_ids(goal, ids=range(40), step=4):
    """Return the ids of the samples with scored tokens in the inner loop."""
    tokens, labels, sample_ids = rows(len(ids), first=ids[0])
    batch = goal.at_step(step).micro_batch(tokens, labels, sample_ids, step, t_U=torch.full((len(ids),), 0.6).double())
    if not batch.inner:
        return set()
    rows = sample_ids if batch.inner_rows_C is None else sample_ids[batch.inner_rows_C]
    first, second = (set(rows[s.sample_N[s.valid_N]].tolist()) for s in (step.scored for step in batch.inner))
    assert first == second
    return first


@pytest.mark.parametrize("fast_weight_type", ["lora", "full"])
def test_sequences_are_trained_either_way(fast_weight_type):
    """Per row, loss and gradient equal either the memory-on or the memory-off result: rows do not interact."""
    model, never = build(), objective(None)
    some = replace(objective(memory(fast_weight_type=fast_weight_type, learning_rate=3.0)), probability=0.5)
    always = replace(some, probability=1.0)
    tokens, labels, ids = rows(6)
    t = torch.full((6,), 0.6, dtype=torch.float64)
    chosen = adapted_ids(some, range(6), step=1)
    assert 0 < len(chosen) < 6
    for row in range(6):
        one = (tokens[row : row + 1], labels[row : row + 1], ids[row : row + 1])
        losses, gradients = [], []
        for kind in (some, always, never):
            model.zero_grad()
            fast = kind.memory and fast_weights.map_leaves(torch.Tensor.double, kind.memory.draw(3, 1, one[2]))
            loss, _ = outer_loss(model, kind.micro_batch(*one, 1, t[:1]), kind.memory, fast or None)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        same, other = (1, 2) if row in chosen else (2, 1)
        # The fast weights' term is either 0 or its value at probability 1; tolerances are float64 rounding.
        assert losses[0] == pytest.approx(losses[same], rel=1e-12) != pytest.approx(losses[other], rel=1e-9)
        torch.testing.assert_close(gradients[0], gradients[same], rtol=1e-9, atol=1e-12)


def test_the_share_is_drawn_by_step_and_sample():
    goal = replace(objective(memory()), probability=0.3)
    count = len(adapted_ids(goal, range(2000)))
    assert abs(count - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    assert adapted_ids(goal, range(40)) == {i for i in range(40) if adapted_ids(goal, range(i, i + 1))}
    assert adapted_ids(goal, step=4) != adapted_ids(goal, step=5) != adapted_ids(replace(goal, seed=4), step=5)
    likelier = replace(goal, probability=0.6)
    assert adapted_ids(goal) < adapted_ids(likelier) < adapted_ids(replace(goal, probability=1.0))


def test_a_shared_memory_is_drawn_for_the_step():
    goal = replace(objective(memory(samples_per_set=None)), probability=0.5)
    all_ids, nothing = set(range(8)), set()
    drawn = [adapted_ids(goal, range(8), step) for step in range(60)]
    assert all(ids in (all_ids, nothing) for ids in drawn)
    assert 15 < drawn.count(all_ids) < 45
    assert all(adapted_ids(goal, range(100, 108), step) in (nothing, set(range(100, 108))) for step in range(3))
    assert [bool(adapted_ids(goal, range(100, 108), step)) for step in range(60)] == [bool(ids) for ids in drawn]


def test_a_memory_of_less_is_no_other_noise():
    goal = objective(memory())
    tokens, labels, ids = rows(4)
    for step in (0, 7):
        a, b = (kind.micro_batch(tokens, labels, ids, step) for kind in (goal, replace(goal, probability=0.4)))
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
        assert torch.equal(a.anchor.index_SM, b.anchor.index_SM)
