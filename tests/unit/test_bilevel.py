"""Bi-level step: invariants, isolation of samples, non-finite values and host waits."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm_dist.method import fast_weight_tree, inner_sgd, trajectory
from memdlm_dist.method.bilevel import adapt_fast_weights, outer_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.performance import straightforward
from memdlm_dist.training.metrics import SKIPPED_UPDATES
from tests.support.bilevel import (
    MASK_ID,
    build,
    data,
    double,
    gradients,
    memory,
    objective,
    recorder,
)


def test_some_gradients_are_clipped_and_some_are_not():
    """Clipping is per row and tensor by its own norm; this threshold clips some of them."""
    model, settings = build(), memory(clip=0.5)
    tokens, labels, ids = data()
    batch = objective(settings).micro_batch(tokens, labels, ids, step=5)
    fast = double(settings.draw(3, 5, ids))
    free = outer_loss(model, batch, memory(clip=0.0), fast)[1].written_norm_G
    clipped = outer_loss(model, batch, settings, fast)[1].written_norm_G
    assert (clipped < free).any() and clipped.max() > 0


def test_one_pooled_set_equals_a_set_per_row_for_a_single_row():
    model = build()
    tokens, labels, ids = data(rows=1)
    losses = []
    for samples_per_set in (1, None):
        settings = memory(samples_per_set=samples_per_set)
        batch = objective(settings).micro_batch(tokens, labels, ids, step=1)
        losses.append(outer_loss(model, batch, settings, double(settings.draw(3, 1, ids)))[0])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_per_sample_does_not_depend_on_the_batch_and_pooled_does():
    model = build()
    tokens, labels, ids = data()

    def loss(rows, samples_per_set):
        settings = memory(samples_per_set=samples_per_set)
        batch = objective(settings).micro_batch(tokens[rows], labels[rows], ids[rows], step=1)
        return outer_loss(model, batch, settings, double(settings.draw(3, 1, ids[rows])))[0].item()

    split = loss(slice(0, 2), 1) + loss(slice(2, 4), 1)
    assert loss(slice(0, 4), 1) == pytest.approx(split, rel=1e-12)
    pooled = loss(slice(0, 2), None) + loss(slice(2, 4), None)
    assert loss(slice(0, 4), None) != pytest.approx(pooled, rel=1e-5)
    # Clipping norms are float32, and gradients of shared sets are summed in another order: 6e-8 each.
    assert loss(slice(0, 4), 2) == pytest.approx(pooled, rel=1e-6)


def test_memory_off_is_bitwise_plain_masked_diffusion():
    model = build(torch.float32)
    tokens, labels, ids = data()
    results = []
    for goal in (objective(memory()), objective(None)):
        model.zero_grad()
        batch = goal.micro_batch(tokens, labels, ids, step=2)
        loss, statistics = goal.loss_sum(model, batch, step=2, use_memory=False)
        loss.backward()
        assert statistics is None
        results.append((loss, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize("use_memory", [True, False])
def test_smoothed_labels_change_the_training_loss_alone(use_memory):
    """Inner losses, measured -log p and held-out losses keep their bits."""
    model, settings = build(torch.float32), memory(loss="kl") if use_memory else None
    plain = objective(settings)
    smoothed = replace(plain, label_smoothing=0.1)
    batch = plain.micro_batch(*data(), step=2)
    fast = settings.draw(3, 2, batch.sample_ids_U) if use_memory else None
    expected, _ = straightforward.outer_loss(model, batch, settings, fast, label_smoothing=0.1)
    (loss, inner), (plain_loss, plain_inner) = (x.loss_sum(model, batch, 2, measures=True) for x in (smoothed, plain))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    assert loss > plain_loss * 1.001
    if use_memory:
        assert torch.equal(inner.loss_KG, plain_inner.loss_KG) and list(inner.anchor_nll) == ["before", "after"]
        assert all(torch.equal(nll, plain_inner.anchor_nll[name]) for name, nll in inner.anchor_nll.items())
    held_out = [x.held_out().loss_sum(model, batch, 0)[0] for x in (smoothed, plain)]
    assert torch.equal(*held_out)


def test_epochs_go_on_with_the_same_fast_weights():
    """Two epochs equal the inner loop run twice, the second time from the first's result."""
    model, settings = build(), memory(loss="kl")
    batch = objective(settings).micro_batch(*data(), step=2)
    start = double(settings.draw(3, 2, batch.sample_ids_U))
    once, first = adapt_fast_weights(model, batch, settings, start)
    expected, second = adapt_fast_weights(model, batch, settings, once)
    ours, both = adapt_fast_weights(model, batch, replace(settings, inner_epochs=2), start)
    for x, y in zip(*map(fast_weight_tree.leaves, (ours, expected)), strict=True):
        assert torch.equal(x, y)
    for name in ("loss_KG", "grad_norm_KG", "counted_KG", "skipped_KG"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(first, name), getattr(second, name)]))
    assert (both.loss_KG[2:] < both.loss_KG[:2]).all() and (both.written_norm_G > first.written_norm_G).all()


def test_zero_inner_learning_rate_changes_nothing():
    model = build()
    tokens, labels, ids = data()
    settings = memory(learning_rate=0.0)
    batch = objective(settings).micro_batch(tokens, labels, ids, step=2)
    with_memory, statistics = outer_loss(model, batch, settings, double(settings.draw(3, 2, ids)))
    plain, _ = outer_loss(model, batch, None)
    torch.testing.assert_close(with_memory, plain, rtol=1e-12, atol=0)  # B = 0: the model starts unchanged
    assert (statistics.written_norm_G == 0).all() and (statistics.grad_norm_KG > 0).all()


def test_outer_loss_is_first_order_and_leaves_no_trace():
    model, settings = build(), memory()
    names = set(model.state_dict())
    tokens, labels, ids = data()
    fast = double(settings.draw(3, 2, ids))
    before = [x.clone() for x in fast_weight_tree.leaves(fast)]
    adapted = []
    batch = objective(settings).micro_batch(tokens, labels, ids, step=2)
    loss, _ = outer_loss(model, batch, settings, fast, on_adapted=adapted.append)
    assert not any(x.requires_grad for x in fast_weight_tree.leaves(adapted[0]))
    assert all(p.grad is None for p in model.parameters()), "the inner loop must not write base gradients"
    loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(fast_weight_tree.leaves(fast), before, strict=True))
    assert set(model.state_dict()) == names


def test_rows_without_targets_and_rows_that_are_not_finite_do_not_touch_the_others():
    model, settings = build(), memory()
    tokens, labels, ids = data(rows=5)
    labels[1] = IGNORE_INDEX  # nothing maskable
    t = torch.tensor([0.6, 0.6, 1e-9, 1.0, 0.6], dtype=torch.float64)  # row 2: nothing masked; row 3: all
    batch = objective(settings).micro_batch(tokens, labels, ids, step=1, t_U=t)
    fast = double(settings.draw(3, 1, ids))
    poisoned = fast["2"]["gate"].A_GRi
    poisoned[4] = torch.nan
    adapted = []
    _, statistics = outer_loss(model, batch, settings, fast, on_adapted=adapted.append)
    assert statistics.counted_KG.tolist() == [[True, False, False, True, False]] * 2
    assert statistics.skipped_KG.tolist() == [[False, False, False, False, True]] * 2
    assert statistics.written_norm_G[:4].gt(0).tolist() == [True, False, False, True]
    for new, old in zip(fast_weight_tree.leaves(adapted[0]), fast_weight_tree.leaves(fast), strict=True):
        assert torch.equal(new[[1, 2]], old[[1, 2]]) and torch.equal(new[4].isnan(), old[4].isnan())

    alone = [0, 3]
    batch = objective(settings).micro_batch(tokens[alone], labels[alone], ids[alone], step=1, t_U=t[alone])
    outer_loss(model, batch, settings, double(settings.draw(3, 1, ids[alone])), on_adapted=adapted.append)
    for together, apart in zip(*map(fast_weight_tree.leaves, adapted), strict=True):
        torch.testing.assert_close(together[alone], apart, rtol=1e-10, atol=1e-12)


def test_a_state_that_is_not_finite_skips_one_rows_update_and_is_counted():
    """Row 2 reads a NaN embedding in an inner state only; the anchor masks that position."""
    model, settings = build(), memory(loss="cross_entropy")
    goal = objective(settings, trajectory="progressive")
    tokens, labels, ids = data()
    broken = MASK_ID - 1
    tokens = torch.where(tokens == broken, 0, tokens)
    labels = torch.where(labels == IGNORE_INDEX, labels, tokens)
    draw = trajectory.draw(3, 1, ids, labels != IGNORE_INDEX)
    anchor = trajectory.anchor_state(draw, "linear", "schedule")
    first, second = (state.mask_BL for state in goal.plan.states(draw, anchor))
    position = (anchor.mask_BL & first & ~second)[2].nonzero()[0]
    tokens[2, position] = labels[2, position] = broken

    def run():
        model.zero_grad()
        adapted = []
        batch = goal.micro_batch(tokens, labels, ids, step=1)
        fast = double(settings.draw(3, 1, ids))
        loss, statistics = outer_loss(model, batch, settings, fast, on_adapted=adapted.append)
        loss.backward()
        metrics = recorder()
        metrics.record_inner_loop(statistics)
        return loss, statistics, adapted[0], metrics._reduce()

    _, clean, clean_fast, clean_scalars = run()
    with torch.no_grad():
        model.tok_embeddings.weight[broken] = torch.nan
    loss, skipped, skipped_fast, scalars = run()

    assert skipped.skipped_KG.tolist() == [[False] * 4, [False, False, True, False]]
    assert not skipped.loss_KG[1, 2].isfinite() and (skipped.skipped_KG == ~skipped.counted_KG).all()
    assert clean_scalars[SKIPPED_UPDATES] == 0 and scalars[SKIPPED_UPDATES] == 1
    assert all(value == value for value in scalars.values()), "averages exclude the row"
    others = [0, 1, 3]
    torch.testing.assert_close(skipped.loss_KG[:, others], clean.loss_KG[:, others], rtol=1e-12, atol=0)
    for after, before in zip(*map(fast_weight_tree.leaves, (skipped_fast, clean_fast)), strict=True):
        assert torch.equal(after[others], before[others]) and after.isfinite().all()
    # Row 2 keeps the first step's update; the outer loss and its gradients are finite.
    assert 0 < skipped.written_norm_G[2] < clean.written_norm_G[2]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model).values())


class HostReads(TorchDispatchMode):
    """Recorder of the operators that make the host wait on an accelerator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket._qualified_op_name
        if name.split("::")[1] in ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "is_nonzero"):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "use_memory, loss, fast_weight_type, trajectory",
    [
        (True, "cross_entropy", "lora", "anchor_consistent"),
        (True, "reverse_kl", "full", "progressive"),
        (True, "hidden_mse", "lora", "pre_anchor_only"),
        (True, "hidden_cosine", "full", "anchor_only"),
        (False, "cross_entropy", "lora", "anchor_consistent"),
    ],
)
def test_a_step_never_waits_for_the_device(use_memory, loss, fast_weight_type, trajectory):
    model, settings = build(torch.float32), memory(loss=loss, fast_weight_type=fast_weight_type)
    goal = objective(settings, trajectory=trajectory)
    batch = goal.micro_batch(*data(), step=2)
    with HostReads() as reads:
        loss, statistics = goal.loss_sum(model, batch, step=2, use_memory=use_memory)
        loss.backward()
        if statistics is not None:
            metrics = recorder()
            metrics.record_inner_loop(statistics)
            metrics.record_rank_loss(loss, batch.maskable)
    assert reads.found == []
    with HostReads() as reads:
        loss.item()
    assert reads.found, "the detector works"


def test_a_gradient_that_is_not_finite_skips_its_set_alone():
    fast = memory().draw(3, 1, torch.arange(3))
    grads = [torch.ones_like(x) for x in fast_weight_tree.leaves(fast)]
    grads[2][1, 0, 0] = torch.inf
    new, norms = inner_sgd.sgd_update(fast, grads, InnerSGD(), torch.tensor([True, True, False]))
    for after, before in zip(fast_weight_tree.leaves(new), fast_weight_tree.leaves(fast), strict=True):
        assert [torch.equal(after[g], before[g]) for g in range(3)] == [False, True, True]
    assert norms.isfinite().tolist() == [True, False, True]


def test_draw_has_the_published_distribution():
    settings = memory(rank=32)
    fast = settings.draw(seed=1, step=1, sample_ids_U=torch.arange(50))
    for linear in settings.linears:
        pair = fast[linear.layer][linear.target]
        bound = linear.in_features**-0.5
        assert pair.A_GRi.shape == (50, 32, linear.in_features) and pair.B_GoR.shape == (
            50,
            linear.out_features,
            32,
        )
        assert pair.A_GRi.abs().max() <= bound and pair.B_GoR.count_nonzero() == 0
        # The uniform distribution's standard deviation is bound / sqrt(3); 51,200 numbers estimate it to 0.4%.
        assert pair.A_GRi.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    flat = [x for x in fast_weight_tree.leaves(fast) if x.count_nonzero()]
    assert len({tuple(x.flatten()[:4].tolist()) for x in flat}) == len(flat), "linears have independent draws"
    assert not torch.equal(flat[0][0], flat[0][1]), "samples have independent draws"


def test_a_linears_draw_does_not_depend_on_which_others_are_adapted():
    ids = torch.arange(2)
    some = memory(targets=("up", "o"), first_layer=2).draw(3, 1, ids)
    more = memory(targets=("attention", "ffn"), first_layer=0).draw(3, 1, ids)
    for target in ("up", "o"):
        assert torch.equal(some["2"][target].A_GRi, more["2"][target].A_GRi)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "hidden_mse"])
def test_single_device_autocast_keeps_every_gradient(loss):
    """Autocast's weight cache must not keep casts without a graph from the no_grad pass."""
    model, settings = build(torch.float32), memory(loss=loss)
    tokens, labels, ids = data()
    batch = objective(settings).micro_batch(tokens, labels, ids, step=2)
    fast = settings.draw(3, 2, ids)
    outer_loss(model, batch, settings, fast)[0].backward()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = outer_loss(model, batch, settings, fast)
    loss.backward()
    for name, gradient in gradients(model).items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0)
        assert cosine > 0.95, f"{name}: {cosine}"  # bfloat16 carries 8 bits
