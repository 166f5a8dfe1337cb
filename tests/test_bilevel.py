"""The bi-level step against oracles: the published numbers, and a plain second writing in float64."""

import naive
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm_dist import fast_weights, trajectory
from memdlm_dist.bilevel import Memory, outer_loss
from memdlm_dist.metrics import MemDLMMetrics
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.objective import Objective
from memdlm_dist.trajectory import IGNORE_INDEX

ARGS = LLaDAArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=61, max_seq_len=24)
MASK_ID = 60


def build(dtype=torch.float64):
    torch.manual_seed(0)
    model = LLaDA(ARGS)
    with torch.no_grad():
        model.init_weights()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # away from 1, so that a norm left out would show
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "layers" in name:  # larger than the initialisation, so that attention is not flat
                parameter.mul_(8)
    for parameter in model.parameters():  # not model.to: that would cast the complex rotary table to real
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64:
        d = ARGS.dim // ARGS.n_heads
        angle = torch.outer(
            torch.arange(ARGS.max_seq_len).double(), ARGS.rope_theta ** (-torch.arange(0, d, 2).double() / d)
        )
        model.freqs_cis = torch.polar(torch.ones_like(angle), angle)
    return model


def memory(**changes) -> Memory:
    settings = {
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 0.1,
        "clip": 1.0,
        "per_sample": True,
        "first_layer": 1,
    }
    settings |= changes
    return Memory(linears=ARGS.adapted_linears(settings["first_layer"], ARGS.targets), **settings)


def objective(with_memory: Memory | None, **changes) -> Objective:
    settings = {"schedule": "linear", "loss_weight": "schedule", "inner_steps": 2, "pre_anchor_scale": 1.5}
    return Objective(mask_token_id=MASK_ID, memory=with_memory, seed=3, shards=1, shard=0, **(settings | changes))


def data(rows=4, prompt=3):
    tokens = torch.randint(0, MASK_ID, (rows, ARGS.max_seq_len), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :prompt] = IGNORE_INDEX
    return tokens, labels, torch.arange(rows) * 17


def double(fast):
    return fast_weights.map_leaves(lambda x: x.double(), fast)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 3])
def test_per_sample_equals_the_naive_version(schedule, steps):
    model, settings = build(), memory(clip=0.5)
    goal = objective(settings, schedule=schedule, inner_steps=steps)
    tokens, labels, ids = data()
    t = torch.tensor([0.3, 0.8, 0.55, 0.97], dtype=torch.float64)
    batch = goal.micro_batch(tokens, labels, ids, step=5, t_B=t)
    start = double(settings.draw(seed=3, step=5, sample_ids_B=ids))
    adapted = []
    loss, statistics = outer_loss(model, batch, settings, start, on_adapted=adapted.append)
    loss.backward()
    ours = gradients(model)

    model.zero_grad()
    oracle = naive.DenseModel(dict(model.named_parameters()), ARGS)
    maskable = labels != IGNORE_INDEX
    u = trajectory.token_noise(3, 5, ids, ARGS.max_seq_len)
    anchor = trajectory.anchor_state(u, maskable, t, schedule, "schedule")
    states = trajectory.anchor_consistent(u, maskable, anchor, steps, 1.5, schedule, "schedule")
    total = 0
    for row in range(len(tokens)):
        fast = {
            layer: {name: (pair.A_GRi[row], pair.B_GoR[row], pair.scale) for name, pair in pairs.items()}
            for layer, pairs in start.items()
        }
        outer, losses, norms, final = naive.bilevel_row(
            oracle, tokens[row], maskable[row], anchor.mask_BL[row], [s.mask_BL[row] for s in states],
            t[row].item(), fast, schedule, 0.1, 0.5, MASK_ID,
        )  # fmt: skip
        total = total + outer
        # The loss weights are float32 (6e-8); all else is float64.
        torch.testing.assert_close(
            statistics.loss_KG[:, row], torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            statistics.grad_norm_KG[:, row].double(), torch.tensor(norms).double(), rtol=1e-5, atol=0
        )
        for layer, pairs in final.items():
            for name, pair in pairs.items():
                torch.testing.assert_close(adapted[0][layer][name].A_GRi[row], pair[0], rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(adapted[0][layer][name].B_GoR[row], pair[1], rtol=1e-6, atol=1e-8)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_some_gradients_are_clipped_and_some_are_not():
    """Guards the test above: with its clip of 0.5 both branches run."""
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
    for per_sample in (True, False):
        settings = memory(per_sample=per_sample)
        batch = objective(settings).micro_batch(tokens, labels, ids, step=1)
        losses.append(outer_loss(model, batch, settings, double(settings.draw(3, 1, ids)))[0])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_per_sample_does_not_depend_on_the_batch_and_pooled_does():
    model = build()
    tokens, labels, ids = data()

    def loss(rows, per_sample):
        settings = memory(per_sample=per_sample)
        batch = objective(settings).micro_batch(tokens[rows], labels[rows], ids[rows], step=1)
        return outer_loss(model, batch, settings, double(settings.draw(3, 1, ids[rows])))[0].item()

    split = loss(slice(0, 2), True) + loss(slice(2, 4), True)
    assert loss(slice(0, 4), True) == pytest.approx(split, rel=1e-12)
    assert loss(slice(0, 4), False) != pytest.approx(loss(slice(0, 2), False) + loss(slice(2, 4), False), rel=1e-6)


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
    before = [x.clone() for x in fast_weights.leaves(fast)]
    adapted = []
    batch = objective(settings).micro_batch(tokens, labels, ids, step=2)
    loss, _ = outer_loss(model, batch, settings, fast, on_adapted=adapted.append)
    assert not any(x.requires_grad for x in fast_weights.leaves(adapted[0]))
    assert all(p.grad is None for p in model.parameters()), "the inner loop must not write base gradients"
    loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(fast_weights.leaves(fast), before, strict=True))
    assert set(model.state_dict()) == names


def test_rows_without_targets_and_rows_that_are_not_finite_do_not_touch_the_others():
    model, settings = build(), memory()
    tokens, labels, ids = data(rows=5)
    labels[1] = IGNORE_INDEX  # nothing maskable
    t = torch.tensor([0.6, 0.6, 1e-9, 1.0, 0.6], dtype=torch.float64)  # row 2: nothing masked; row 3: all
    batch = objective(settings).micro_batch(tokens, labels, ids, step=1, t_B=t)
    fast = double(settings.draw(3, 1, ids))
    poisoned = fast["2"]["gate"].A_GRi
    poisoned[4] = torch.nan
    adapted = []
    _, statistics = outer_loss(model, batch, settings, fast, on_adapted=adapted.append)
    assert statistics.counted_KG.tolist() == [[True, False, False, True, False]] * 2
    assert statistics.skipped_KG.tolist() == [[False, False, False, False, True]] * 2
    assert statistics.written_norm_G[:4].gt(0).tolist() == [True, False, False, True]
    for new, old in zip(fast_weights.leaves(adapted[0]), fast_weights.leaves(fast), strict=True):
        assert torch.equal(new[[1, 2]], old[[1, 2]]) and torch.equal(new[4].isnan(), old[4].isnan())

    alone = [0, 3]
    batch = objective(settings).micro_batch(tokens[alone], labels[alone], ids[alone], step=1, t_B=t[alone])
    outer_loss(model, batch, settings, double(settings.draw(3, 1, ids[alone])), on_adapted=adapted.append)
    for together, apart in zip(*map(fast_weights.leaves, adapted), strict=True):
        torch.testing.assert_close(together[alone], apart, rtol=1e-10, atol=1e-12)


class HostReads(TorchDispatchMode):
    """Collects the operators whose result the host has to wait for on an accelerator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket._qualified_op_name
        if name.split("::")[1] in ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "is_nonzero"):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_memory", [True, False])
def test_a_step_never_waits_for_the_device(use_memory):
    model, settings = build(torch.float32), memory()
    goal = objective(settings)
    batch = goal.micro_batch(*data(), step=2)
    with HostReads() as reads:
        loss, statistics = goal.loss_sum(model, batch, step=2, use_memory=use_memory)
        loss.backward()
        if statistics is not None:
            metrics = MemDLMMetrics.__new__(MemDLMMetrics)  # only what recording needs, not TensorBoard
            metrics.start_step()
            metrics.record_inner_loop(statistics)
    assert reads.found == []
    with HostReads() as reads:
        loss.item()
    assert reads.found, "the detector works"


def test_a_gradient_that_is_not_finite_skips_its_set_alone():
    fast = memory().draw(3, 1, torch.arange(3))
    grads = [torch.ones_like(x) for x in fast_weights.leaves(fast)]
    grads[2][1, 0, 0] = torch.inf
    new, norms = fast_weights.sgd_update(fast, grads, 0.1, 1.0, torch.tensor([True, True, False]))
    for after, before in zip(fast_weights.leaves(new), fast_weights.leaves(fast), strict=True):
        assert [torch.equal(after[g], before[g]) for g in range(3)] == [False, True, True]
    assert norms.isfinite().tolist() == [True, False, True]


def test_draw_has_the_published_distribution():
    settings = memory(rank=32)
    fast = settings.draw(seed=1, step=1, sample_ids_B=torch.arange(50))
    for linear in settings.linears:
        pair = fast[linear.layer][linear.target]
        bound = linear.in_features**-0.5
        assert pair.A_GRi.shape == (50, 32, linear.in_features) and pair.B_GoR.shape == (
            50,
            linear.out_features,
            32,
        )
        assert pair.A_GRi.abs().max() <= bound and pair.B_GoR.count_nonzero() == 0
        # Over 51,200 numbers: the uniform distribution's standard deviation is bound / sqrt(3), to 0.4%.
        assert pair.A_GRi.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    flat = [x for x in fast_weights.leaves(fast) if x.count_nonzero()]
    assert len({tuple(x.flatten()[:4].tolist()) for x in flat}) == len(flat), "every linear gets its own numbers"
    assert not torch.equal(flat[0][0], flat[0][1]), "every sequence gets its own numbers"


def test_single_device_autocast_keeps_every_gradient():
    """Autocast caches the casts of weights; the no_grad pass must not leave casts without a graph there."""
    model, settings = build(torch.float32), memory()
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
