"""Noise schedules, trajectory states, scored tokens and the inputs of a micro-batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from memdlm_dist.method import trajectory
from memdlm_dist.method.diffusion import SMALLEST_LEVEL, level_from_uniform, noise_at
from memdlm_dist.method.micro_batch import gather_scored, micro_batch
from memdlm_dist.method.trajectory import Draw, Plan, State, anchor_state
from tests.oracles import naive

LENGTH, MASK_ID = 48, 127


def draw(seed=0, step=1, rows=16, prompt=0, t=None):
    ids = torch.arange(rows)
    maskable = torch.ones(rows, LENGTH, dtype=torch.bool)
    maskable[:, :prompt] = False
    t = None if t is None else torch.as_tensor(t, dtype=torch.float64).expand(rows)
    return trajectory.draw(seed, step, ids, maskable, t)


def counts(mask):
    return mask.sum(1).tolist()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.9, 1.0])
def test_schedules(schedule, t):
    noise = noise_at(torch.tensor(t, dtype=torch.float64), schedule)
    # float64 throughout: equal to rounding, up to cancellation in cos near t = 0.
    assert noise.mask_probability.item() == pytest.approx(naive.mask_probability(t, schedule), abs=1e-15)
    assert noise.weight.item() == pytest.approx(naive.weight(t, schedule), rel=1e-12, abs=1e-12)
    assert noise_at(torch.tensor(t), schedule, "uniform").weight == 1


def test_the_weight_is_the_schedules_derivative():
    # (d/dt p) / p of the mask probability p, by central differences in float64.
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    for schedule in ("linear", "cosine"):
        p = [noise_at(t + d, schedule).mask_probability for d in (-h, 0, h)]
        derivative = (p[2] - p[0]) / (2 * h)
        torch.testing.assert_close(noise_at(t, schedule).weight, derivative / (p[1] + 1e-6), rtol=1e-6, atol=0)


def test_levels_stay_off_zero():
    assert level_from_uniform(torch.tensor(0.0)) == SMALLEST_LEVEL
    assert level_from_uniform(torch.tensor(1.0)) == 1


def test_prompts_are_never_masked_and_ratios_follow_the_level():
    for schedule, t, expected in (("linear", 0.3, 0.3), ("cosine", 0.5, 0.70710678)):
        anchor = anchor_state(draw(rows=256, prompt=8, t=t), schedule, "schedule")
        assert not anchor.mask_BL[:, :8].any()
        # 10,240 tokens: standard error below 0.005
        assert anchor.mask_BL[:, 8:].double().mean().item() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1.0, 1.25, 1.5, 1.6, 2.0])
def test_states_are_nested_down_to_the_anchor(steps, scale):
    noise = draw(prompt=5)
    anchor = anchor_state(noise, "linear", "schedule")
    states = Plan(inner_steps=steps, pre_anchor_scale=scale).states(noise, anchor)
    assert len(states) == steps
    if steps > 1:
        assert states[-1].mask_BL is anchor.mask_BL, "the same object, so that both share the anchor's pass"
    for before, after in itertools.pairwise([*states, anchor]):
        assert (after.mask_BL <= before.mask_BL).all(), "a revealed token must stay revealed"
    for row in range(len(noise.u_BL)):
        n, a = int(noise.maskable_BL[row].sum()), int(anchor.mask_BL[row].sum())
        expected = [naive.pre_anchor_count(n, a, scale)]
        for steps_left in range(steps - 1, 0, -1):
            expected.append(expected[-1] - -(-(expected[-1] - a) // steps_left))
        assert [int(state.mask_BL[row].sum()) for state in states] == expected
        for state, count in zip(states, expected, strict=True):
            if count:
                # The weight uses the realised ratio, which the reference holds in float32.
                assert state.weight_U[row].item() == pytest.approx(naive.weight(count / n, "linear"), rel=1e-6)


def test_pre_anchor_rounds_as_the_published_code():
    # 6 of 28 at s = 1.5: exact arithmetic gives 9, float32 ratios give 8.
    u = torch.arange(28, dtype=torch.float64).unsqueeze(0) / 28
    noise = Draw(torch.ones(1, 28, dtype=torch.bool), torch.tensor([5.5 / 28], dtype=torch.float64), u, u)
    anchor = anchor_state(noise, "linear", "schedule")
    assert int(anchor.mask_BL.sum()) == 6
    assert int(Plan().states(noise, anchor)[0].mask_BL.sum()) == 8


def test_single_states():
    noise = draw(prompt=3)
    anchor = anchor_state(noise, "linear", "schedule")
    pre, _ = Plan().states(noise, anchor)
    (only,) = Plan(trajectory="pre_anchor_only").states(noise, anchor)
    assert torch.equal(only.mask_BL, pre.mask_BL) and torch.equal(only.weight_U, pre.weight_U)
    assert only.next_BL is anchor.mask_BL, "the anchor still follows the pre-anchor"
    (only,) = Plan(trajectory="anchor_only").states(noise, anchor)
    assert only.mask_BL is anchor.mask_BL and only.next_BL is None
    # The weight uses the sampled t; with several states, the anchor's weight uses its realised ratio.
    torch.testing.assert_close(only.weight_U.double(), 1 / (noise.t_U + 1e-6), rtol=1e-7, atol=0)


@pytest.mark.parametrize("end", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_progressive_ignores_the_anchor(steps, end):
    plan = Plan(trajectory="progressive", inner_steps=steps, progressive_end=end)
    noise, other = draw(prompt=3, t=0.1), draw(prompt=3, t=0.9)
    states = plan.states(noise, anchor_state(noise, "linear", "schedule"))
    again = plan.states(other, anchor_state(other, "linear", "schedule"))
    ratios = [0.8 + (end - 0.8) * (k / (steps - 1)) for k in range(steps)] if steps > 1 else [end]
    for k, (state, same, ratio) in enumerate(zip(states, again, ratios, strict=True)):
        assert torch.equal(state.mask_BL, same.mask_BL)
        assert state.weight_U.tolist() == pytest.approx([naive.weight(ratio, "linear")] * len(noise.t_U), rel=1e-6)
        if k == 0:
            assert torch.equal(state.mask_BL, noise.maskable_BL & (noise.v_BL < ratio))
        else:
            first, n = states[0].mask_BL.sum(1), LENGTH - 3
            assert torch.equal(state.mask_BL.sum(1), first.clamp(max=int(n * ratio)))
            assert (state.mask_BL <= states[k - 1].mask_BL).all()
    # Anchor and progressive draws are independent: 16 rows of 45 tokens, standard error 0.037.
    correlation = torch.corrcoef(torch.stack([noise.u_BL.flatten(), noise.v_BL.flatten()]))[0, 1]
    assert abs(correlation) < 0.15


def test_newly_revealed_targets():
    noise = draw(prompt=3)
    anchor = anchor_state(noise, "linear", "schedule")
    for kind in trajectory.TRAJECTORIES:
        plan = Plan(trajectory=kind, inner_steps=3 if kind not in trajectory.SINGLE_STATE else 2)
        masked = plan.states(noise, anchor)
        newly = replace(plan, supervision="newly_revealed").states(noise, anchor)
        for k, (state, revealed) in enumerate(zip(masked, newly, strict=True)):
            assert torch.equal(state.target_BL, state.mask_BL) and torch.equal(state.mask_BL, revealed.mask_BL)
            if kind == "pre_anchor_only":
                assert torch.equal(revealed.target_BL, state.mask_BL & ~anchor.mask_BL)
            elif k == len(masked) - 1:  # the clean sequence follows, which reveals everything
                assert torch.equal(revealed.target_BL, state.mask_BL)
            else:
                assert torch.equal(revealed.target_BL, state.mask_BL & ~masked[k + 1].mask_BL)


def test_anchor_targets():
    noise = draw(prompt=3)
    anchor = anchor_state(noise, "linear", "schedule")
    for kind in trajectory.TRAJECTORIES:
        plan = Plan(trajectory=kind, inner_steps=3 if kind not in trajectory.SINGLE_STATE else 2)
        masked = plan.states(noise, anchor)
        for state, other in zip(replace(plan, supervision="anchor").states(noise, anchor), masked, strict=True):
            assert torch.equal(state.mask_BL, other.mask_BL) and torch.equal(state.weight_U, other.weight_U)
            # A progressive state shows some of the anchor's tokens.
            assert torch.equal(state.target_BL, anchor.mask_BL) is (kind != "progressive")
            assert torch.equal(state.target_BL, anchor.mask_BL & state.mask_BL)


def test_published_pre_anchor_counts_and_levels(root):
    inputs = load_file(root / "tests/golden/dense_pmc_ce/inputs.safetensors")
    maskable = inputs["labels"] != trajectory.IGNORE_INDEX
    mask = inputs["anchor_mask"]
    # A draw that ranks the fixture's anchor tokens first.
    u = torch.where(mask, 0.0, 0.5).double() + torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) / 4
    noise = Draw(maskable, inputs["t"].double(), u, u)
    for k, state in enumerate(Plan().states(noise, State(mask, mask, torch.ones(2)))):
        assert torch.equal(state.mask_BL.sum(1), inputs["step_masks"][k].sum(1))
        expected = 1 / (inputs["step_t"][k].double() + 1e-6)
        torch.testing.assert_close(state.weight_U, expected.float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["anchor_consistent", "pre_anchor_only", "anchor_only", "progressive"])
def test_edge_rows(kind):
    """Rows: all masked, none maskable, none masked, one masked (pre-anchor equals anchor), and a short row."""
    noise = draw(rows=5, t=torch.tensor([1.0, 0.5, 1e-9, 0.5, 0.5]))
    noise.maskable_BL[1] = False
    noise.u_BL[3] = 0.9
    noise.u_BL[3, 7] = 0.1  # one masked token of 48; int(1.5) is one as well
    noise.maskable_BL[4, 10:] = False
    anchor = anchor_state(noise, "linear", "schedule")
    assert counts(anchor.mask_BL)[:4] == [LENGTH, 0, 0, 1]
    for supervision in trajectory.SUPERVISION:
        states = Plan(trajectory=kind, supervision=supervision).states(noise, anchor)
        for state in states:
            assert (state.target_BL <= state.mask_BL).all() and (state.mask_BL <= noise.maskable_BL).all()
            assert state.weight_U.isfinite().all()
            if kind != "progressive":
                assert counts(state.mask_BL)[:4] == [LENGTH, 0, 0, 1]
        if kind == "anchor_consistent" and supervision == "newly_revealed":
            assert counts(states[0].target_BL)[:4] == [0, 0, 0, 0], "the anchor reveals nothing new"
        if kind == "progressive":  # int(ratio * n) for n = 48, 0 and 10, with a ratio just below 0.2
            assert [counts(states[1].mask_BL)[row] for row in (0, 1, 4)] == [9, 0, 1]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_gathering_finds_every_target_once(tp_size):
    anchor = anchor_state(draw(rows=3), "linear", "schedule")
    tokens = torch.arange(3 * LENGTH).reshape(3, LENGTH)
    scored = gather_scored(anchor, tokens, tp_size)
    width = LENGTH // tp_size
    labels = set()
    for slot, (label, weight, row, valid) in enumerate(
        zip(
            scored.label_N.tolist(),
            scored.weight_N.tolist(),
            scored.sample_N.tolist(),
            scored.valid_N.tolist(),
            strict=True,
        )
    ):
        if not valid:
            continue
        tp_rank = slot // scored.index_SM.shape[1]
        index = scored.index_SM.flatten()[slot].item()
        # A rank's activations are [B, L / tp_size], flattened; labels equal the token's global position.
        assert label == (index // width) * LENGTH + tp_rank * width + index % width
        assert row == label // LENGTH and weight == anchor.weight_U[row].item()
        labels.add(label)
    assert labels == set(tokens[anchor.mask_BL].tolist())


def test_gathering_nothing_keeps_a_few_slots():
    nothing = torch.zeros(2, LENGTH, dtype=torch.bool)
    scored = gather_scored(State(nothing, nothing, torch.ones(2)), torch.zeros(2, LENGTH, dtype=torch.int64), 2)
    # A sixteenth of the 48 tokens on a rank, so that the head never gets an empty input.
    assert scored.index_SM.shape == (2, 3) and not scored.valid_N.any()


@pytest.mark.parametrize("rows, tp_size", [(1, 1), (2, 2), (5, 1)])
def test_the_head_sees_few_shapes(rows, tp_size):
    tokens, shapes = torch.zeros(rows, LENGTH, dtype=torch.int64), set()
    for count in range(LENGTH + 1):
        target = (torch.arange(LENGTH) < count).expand(rows, LENGTH)
        scored = gather_scored(State(target, target, torch.ones(rows)), tokens, tp_size)
        shapes.add(scored.index_SM.shape[1])
        assert int(scored.valid_N.sum()) == rows * count
    assert len(shapes) <= 16 and max(shapes) == rows * LENGTH // tp_size


@pytest.mark.parametrize(
    "kind, with_teacher, students, teachers",
    [
        # Input 0 is the anchor; the last teacher's clean sequence is one more input.
        ("anchor_consistent", False, [1, 0], [None, None]),
        ("anchor_consistent", True, [1, 0], [0, 2]),
        ("pre_anchor_only", True, [1], [0]),
        ("anchor_only", True, [0], [1]),
        ("progressive", True, [1, 2], [2, 3]),
    ],
)
def test_a_micro_batch_reads_every_state_once(kind, with_teacher, students, teachers):
    noise = draw(rows=2)
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 100
    anchor = anchor_state(noise, "linear", "schedule")
    states = Plan(trajectory=kind).states(noise, anchor)
    ids = torch.arange(2)
    batch = micro_batch(tokens, noise.maskable_BL, ids, anchor, states, MASK_ID, with_teacher)
    assert [step.student for step in batch.inner] == students and [step.teacher for step in batch.inner] == teachers
    assert len(batch.inputs) == 1 + max(students + [number for number in teachers if number is not None])
    for mask, number in [(anchor.mask_BL, 0), *zip((s.mask_BL for s in states), students, strict=True)]:
        tokens_BL = batch.inputs[number]
        assert (tokens_BL[mask] == MASK_ID).all() and torch.equal(tokens_BL[~mask], tokens[~mask])
    if teachers[-1] is not None and kind != "pre_anchor_only":
        assert torch.equal(batch.inputs[teachers[-1]], tokens), "the last teacher reads the clean sequence"


def test_the_number_of_inputs_does_not_depend_on_the_draw():
    """Fully masked pre-anchors equal the anchor but keep their own pass, so that ranks issue equal collectives."""
    noise = draw(rows=2, t=1.0)
    anchor = anchor_state(noise, "linear", "schedule")
    batch = micro_batch(
        torch.zeros_like(noise.maskable_BL, dtype=torch.int64),
        noise.maskable_BL,
        torch.arange(2),
        anchor,
        Plan().states(noise, anchor),
        MASK_ID,
    )
    assert torch.equal(*batch.inputs) and [step.student for step in batch.inner] == [1, 0]
