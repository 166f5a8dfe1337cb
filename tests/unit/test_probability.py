"""parametric_memory.probability: which sequences train with the memory, and what becomes of the others."""

from dataclasses import replace

import pytest
import torch

from memdlm_dist.method import fast_weights
from memdlm_dist.method.bilevel import outer_loss
from tests.support.bilevel import build, memory, objective


def rows(count, length=16, first=0):
    tokens = torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.clone(), torch.arange(first, first + count)


def written(found, ids=range(40), step=4):
    """Which samples have something to score in the inner loop."""
    tokens, labels, sample_ids = rows(len(ids), first=ids[0])
    batch = found.micro_batch(tokens, labels, sample_ids, step, t_U=torch.full((len(ids),), 0.6).double())
    first, second = (set((s.sample_N[s.valid_N] + ids[0]).tolist()) for s in (step.scored for step in batch.inner))
    assert first == second
    return first


@pytest.mark.parametrize("fast_weight_type", ["lora", "full"])
def test_sequences_are_trained_either_way(fast_weight_type):
    """Each row's loss and gradient are those with the memory or those without, exactly: rows do not touch."""
    model, plain = build(), objective(None)
    both = replace(objective(memory(fast_weight_type=fast_weight_type, learning_rate=3.0)), probability=0.5)
    full = replace(both, probability=1.0)
    tokens, labels, ids = rows(6)
    t = torch.full((6,), 0.6, dtype=torch.float64)
    chosen = written(both, range(6), step=1)
    assert 0 < len(chosen) < 6
    for row in range(6):
        one = (tokens[row : row + 1], labels[row : row + 1], ids[row : row + 1])
        losses, gradients = [], []
        for kind in (both, full, plain):
            model.zero_grad()
            fast = kind.memory and fast_weights.map_leaves(torch.Tensor.double, kind.memory.draw(3, 1, one[2]))
            loss, _ = outer_loss(model, kind.micro_batch(*one, 1, t[:1]), kind.memory, fast)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        alike, other = (1, 2) if row in chosen else (2, 1)
        # The adapter's term is 0, or what it is with the memory in every sequence; float64 rounding.
        assert losses[0] == pytest.approx(losses[alike], rel=1e-12) != pytest.approx(losses[other], rel=1e-9)
        torch.testing.assert_close(gradients[0], gradients[alike], rtol=1e-9, atol=1e-12)


def test_the_share_is_drawn_by_step_and_sample():
    found = replace(objective(memory()), probability=0.3)
    count = len(written(found, range(2000)))
    assert abs(count - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    assert written(found, range(40)) == {i for i in range(40) if written(found, range(i, i + 1))}
    assert written(found, step=4) != written(found, step=5) != written(replace(found, seed=4), step=5)
    more = replace(found, probability=0.6)
    assert written(found) < written(more) < written(replace(found, probability=1.0))


def test_a_shared_memory_is_drawn_for_the_step():
    found = replace(objective(memory(per_sample=False)), probability=0.5)
    whole, nothing = set(range(8)), set()
    drawn = [written(found, range(8), step) for step in range(60)]
    assert all(one in (whole, nothing) for one in drawn)
    assert 15 < drawn.count(whole) < 45
    assert all(written(found, range(100, 108), step) in (nothing, set(range(100, 108))) for step in range(3))
    assert [bool(written(found, range(100, 108), step)) for step in range(60)] == [bool(one) for one in drawn]


def test_a_memory_of_less_is_no_other_noise():
    found = objective(memory())
    tokens, labels, ids = rows(4)
    for step in (0, 7):
        a, b = (kind.micro_batch(tokens, labels, ids, step) for kind in (found, replace(found, probability=0.4)))
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
        assert torch.equal(a.anchor.index_SM, b.anchor.index_SM)
