import itertools

import naive
import pytest
import torch
from safetensors.torch import load_file

from memdlm_dist import trajectory
from memdlm_dist.diffusion import SMALLEST_LEVEL, level_from_uniform, noise_at
from memdlm_dist.trajectory import State, anchor_consistent, anchor_state, gather_scored, view

LENGTH, MASK_ID = 48, 127


def draw(seed=0, step=1, rows=16, prompt=0):
    ids = torch.arange(rows)
    maskable = torch.ones(rows, LENGTH, dtype=torch.bool)
    maskable[:, :prompt] = False
    t = trajectory.noise_levels(seed, step, ids)
    return trajectory.token_noise(seed, step, ids, LENGTH), maskable, t


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_schedules(schedule, t):
    noise = noise_at(torch.tensor(t, dtype=torch.float64), schedule)
    # float64 throughout: equal to rounding, up to cancellation in cos near t = 0.
    assert noise.mask_probability.item() == pytest.approx(naive.mask_probability(t, schedule), abs=1e-15)
    assert noise.weight.item() == pytest.approx(naive.weight(t, schedule), rel=1e-12, abs=1e-12)
    assert noise_at(torch.tensor(t), schedule, "uniform").weight == 1


def test_the_weight_is_the_schedules_derivative():
    # d/dt of the mask probability over the mask probability, by central differences in float64.
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    for schedule in ("linear", "cosine"):
        p = [noise_at(t + d, schedule).mask_probability for d in (-h, 0, h)]
        derivative = (p[2] - p[0]) / (2 * h)
        torch.testing.assert_close(noise_at(t, schedule).weight, derivative / (p[1] + 1e-6), rtol=1e-6, atol=0)


def test_levels_stay_off_zero():
    assert level_from_uniform(torch.tensor(0.0)) == SMALLEST_LEVEL
    assert level_from_uniform(torch.tensor(1.0)) == 1


def test_prompts_are_never_masked_and_ratios_follow_the_level():
    u, maskable, _ = draw(rows=256, prompt=8)
    for schedule, t, expected in (("linear", 0.3, 0.3), ("cosine", 0.5, 0.70710678)):
        anchor = anchor_state(u, maskable, torch.full((256,), t, dtype=torch.float64), schedule, "schedule")
        assert not anchor.mask_BL[:, :8].any()
        # 10,240 tokens: standard error below 0.005
        assert anchor.mask_BL[:, 8:].double().mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("scale", [1.25, 1.5, 2.0])
def test_states_are_nested_down_to_the_anchor(steps, scale):
    u, maskable, t = draw(prompt=5)
    anchor = anchor_state(u, maskable, t, "linear", "schedule")
    states = anchor_consistent(u, maskable, anchor, steps, scale, "linear", "schedule")
    assert len(states) == steps
    assert torch.equal(states[-1].mask_BL, anchor.mask_BL)
    for before, after in itertools.pairwise(states):
        assert (after.mask_BL <= before.mask_BL).all(), "a revealed token must stay revealed"
    for row in range(len(u)):
        n, a = int(maskable[row].sum()), int(anchor.mask_BL[row].sum())
        counts = [naive.pre_anchor_count(n, a, scale)]
        for left in range(steps - 1, 0, -1):
            counts.append(counts[-1] - -(-(counts[-1] - a) // left))
        assert [int(state.mask_BL[row].sum()) for state in states] == counts
        for state, count in zip(states, counts, strict=True):
            if count:
                # The weight is that of the realised ratio, which the reference holds in float32.
                assert state.weight_B[row].item() == pytest.approx(naive.weight(count / n, "linear"), rel=1e-6)


def test_pre_anchor_rounds_as_the_published_code():
    # 6 of 28 at s = 1.5: exact arithmetic gives 9, float32 ratios give 8.
    u = torch.arange(28, dtype=torch.float64).unsqueeze(0) / 28
    maskable = torch.ones(1, 28, dtype=torch.bool)
    anchor = anchor_state(u, maskable, torch.tensor([5.5 / 28], dtype=torch.float64), "linear", "schedule")
    assert int(anchor.mask_BL.sum()) == 6
    pre = anchor_consistent(u, maskable, anchor, 2, 1.5, "linear", "schedule")[0]
    assert int(pre.mask_BL.sum()) == 8


def test_pre_anchor_counts_and_levels_of_the_golden_fixture(root):
    inputs = load_file(root / "tests/golden/dense_pmc_ce/inputs.safetensors")
    maskable = inputs["labels"] != trajectory.IGNORE_INDEX
    mask = inputs["anchor_mask"]
    # Any draw under which the fixture's anchor tokens come first.
    u = torch.where(mask, 0.0, 0.5).double() + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) / 4
    states = anchor_consistent(u, maskable, State(mask, mask, torch.ones(2)), 2, 1.5, "linear", "schedule")
    for k, state in enumerate(states):
        assert torch.equal(state.mask_BL.sum(1), inputs["step_masks"][k].sum(1))
        expected = 1 / (inputs["step_t"][k].double() + 1e-6)
        torch.testing.assert_close(state.weight_B, expected.float(), rtol=1e-7, atol=0)


def test_edge_rows():
    u, maskable, _ = draw(rows=4)
    maskable[1] = False  # nothing maskable
    t = torch.tensor([1.0, 0.5, 1e-9, 0.5], dtype=torch.float64)  # everything masked, -, nothing masked, -
    anchor = anchor_state(u, maskable, t, "linear", "schedule")
    assert anchor.mask_BL.sum(1).tolist()[:3] == [LENGTH, 0, 0]
    for state in anchor_consistent(u, maskable, anchor, 2, 1.5, "linear", "schedule"):
        assert state.mask_BL.sum(1).tolist()[:3] == [LENGTH, 0, 0]
        assert state.weight_B.isfinite().all()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_gathering_finds_every_target_once(shards):
    u, maskable, t = draw(rows=3)
    anchor = anchor_state(u, maskable, t, "linear", "schedule")
    tokens = torch.arange(3 * LENGTH).reshape(3, LENGTH)
    scored = gather_scored(anchor, tokens, shards)
    width = LENGTH // shards
    found = set()
    for slot, (label, weight, row, valid) in enumerate(
        zip(
            scored.label_N.tolist(),
            scored.weight_N.tolist(),
            scored.row_N.tolist(),
            scored.valid_N.tolist(),
            strict=True,
        )
    ):
        if not valid:
            continue
        shard = slot // scored.index_SM.shape[1]
        index = scored.index_SM.flatten()[slot].item()
        # The rank's activations are [B, L / shards] flattened; the label says where the token really is.
        assert label == (index // width) * LENGTH + shard * width + index % width
        assert row == label // LENGTH and weight == anchor.weight_B[row].item()
        found.add(label)
    assert found == set(tokens[anchor.mask_BL].tolist())


def test_gathering_nothing_keeps_one_slot():
    nothing = torch.zeros(2, LENGTH, dtype=torch.bool)
    scored = gather_scored(State(nothing, nothing, torch.ones(2)), torch.zeros(2, LENGTH, dtype=torch.int64), 2)
    assert scored.index_SM.shape == (2, 1) and not scored.valid_N.any()


def test_view_shows_the_mask_token():
    u, maskable, t = draw(rows=2)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 100
    anchor = anchor_state(u, maskable, t, "linear", "schedule")
    shown = view(anchor, tokens, MASK_ID).tokens_BL
    assert (shown[anchor.mask_BL] == MASK_ID).all() and torch.equal(shown[~anchor.mask_BL], tokens[~anchor.mask_BL])
