"""parametric_memory.probability: the share of samples that adapt; the rest train as plain masked diffusion."""

from dataclasses import replace

import pytest
import torch

from memdlm_dist.method import fast_weight_tree
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
    read = sample_ids if batch.inner_rows_C is None else sample_ids[batch.inner_rows_C]
    first, second = (set(read[s.sample_N[s.valid_N]].tolist()) for s in (step.scored for step in batch.inner))
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
            fast = kind.memory and fast_weight_tree.map_leaves(torch.Tensor.double, kind.memory.draw(3, 1, one[2]))
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
        read = slice(None) if b.inner_rows_C is None else b.inner_rows_C
        assert torch.equal(a.inputs[0], b.inputs[0])
        assert all(torch.equal(x[read], y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True))
        assert torch.equal(a.anchor.index_SM, b.anchor.index_SM)


def test_the_inner_loop_reads_a_few_numbers_of_rows():
    """Chosen rows, and others up to 0, a power of two or all; groups of rows with a common set stay whole."""
    tokens, labels, ids = rows(6)
    seen = {}
    for samples_per_set, sizes in ((1, {0, 1, 2, 4, 6}), (2, {0, 2, 4, 6})):
        goal = replace(objective(memory(samples_per_set=samples_per_set)), probability=0.5)
        assert set(goal.row_counts(6 // samples_per_set)) == {size // samples_per_set for size in sizes}
        for step in range(60):
            batch = goal.micro_batch(tokens, labels, ids, step)
            read = ids if batch.inner_rows_C is None else batch.inner_rows_C
            chosen = batch.adapted_U.nonzero().flatten()
            assert set(chosen.tolist()) <= set(read.tolist()) and len(read) in sizes
            assert torch.equal(read, read.sort().values)
            assert len(read) == min(size for size in sizes if size >= len(chosen))
            assert batch.adapted_U.view(-1, samples_per_set).float().mean(1).remainder(1).eq(0).all()
            seen.setdefault(samples_per_set, set()).add(len(read))
            for step_ in batch.inner:
                assert set(read[step_.scored.sample_N[step_.scored.valid_N]].tolist()) <= set(chosen.tolist())
        assert seen[samples_per_set] == sizes, "every size occurs"


def test_steps_train_with_the_memory_or_without():
    """All sets of a step are chosen or none with the unit "step"; at probability 1 the unit changes nothing."""
    goal = replace(objective(memory(samples_per_set=2)), probability=0.4, probability_unit="step", start_step=5)
    plain = [goal.at_step(step).memory is None for step in range(500)]
    assert all(plain[:5]) and abs(500 - sum(plain) - 198) < 4 * (495 * 0.24) ** 0.5
    assert all(goal.at_step(s).probability == 1 for s in range(500) if not plain[s])
    assert replace(goal, probability=1.0).at_step(7).memory is not None
    assert [replace(goal, seed=9).at_step(step).memory is None for step in range(500)] != plain
    variants = [(x.memory is not None, count) for x, count in goal.variants(4)]
    assert variants == [(False, None), (True, None)]
    by_sample = replace(goal, probability_unit="sample", start_step=1)
    assert [(x.memory is not None, count) for x, count in by_sample.variants(8)] == [(True, c) for c in (0, 1, 2, 4)]
    assert [count for _, count in replace(by_sample, slots=4).variants(3)] == [0, 1, 2, 3]


@pytest.mark.parametrize("samples_per_set", [1, 2])
def test_rows_without_the_memory_are_plain(samples_per_set):
    """A micro-batch with some chosen rows: loss and gradient are the sums over rows trained one way or the other."""
    model, never = build(), objective(None)
    settings = memory(samples_per_set=samples_per_set, learning_rate=0.3)
    some = replace(objective(settings), probability=0.35)
    tokens, labels, ids = rows(8)
    steps = {}  # number of rows that the inner loop reads -> a step that reads so many
    for step in range(60):
        batch = some.micro_batch(tokens, labels, ids, step)
        steps[0 if not batch.inner else 8 if batch.inner_rows_C is None else len(batch.inner_rows_C)] = step
    assert {0, 4, 8} <= set(steps)
    for step in steps.values():
        batch = some.micro_batch(tokens, labels, ids, step)
        results = []
        for apart in (False, True):
            model.zero_grad()
            total = 0.0
            for first in range(0, 8, samples_per_set) if apart else [0]:
                one = slice(first, first + (samples_per_set if apart else 8))
                kind = some if not apart else replace(some, probability=1.0) if batch.adapted_U[first] else never
                drawn = kind.micro_batch(tokens[one], labels[one], ids[one], step)
                fast = kind.memory and fast_weight_tree.map_leaves(
                    torch.Tensor.double, settings.draw(3, step, ids[one])
                )
                loss, _ = outer_loss(model, drawn, kind.memory, fast)
                loss.backward()
                total += loss.item()
            results.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
        # Clipping norms are float32 (6e-8 each, and amplified by the inner steps); everything else is float64.
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-7)
        assert (results[0][1] - results[1][1]).norm() < 1e-6 * results[1][1].norm()
