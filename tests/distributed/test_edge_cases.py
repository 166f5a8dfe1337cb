"""Unusual rows through the real trainer on several ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.data.shards import ShardWriter, read_card
from memdlm_dist.method import trajectory
from memdlm_dist.method.trajectory import Plan
from memdlm_dist.training.metrics import HARDWARE_FLOPS
from tests.support.launching import debug, run_many, scalars

LENGTH = 32
LOCAL = "--training.local_batch_size"
LAYOUTS = {
    "single": (1, [LOCAL, "4"]),
    "fsdp4": (4, [LOCAL, "1"]),
    "tp2-accumulation2": (
        2, [LOCAL, "2", "--training.global_batch_size", "4", "--parallelism.tensor_parallel_degree", "2"],
    ),
}  # fmt: skip
OPTIONS = {
    "default": [],
    "distilling": [
        "--parametric_memory.inner_loss", "kl", "--parametric_memory.supervision", "newly_revealed",
        "--parametric_memory.inner_steps", "3", "--parametric_memory.inner_epochs", "2",
        "--diffusion.loss_norm", "answer",
    ],
}  # fmt: skip
SEED = 7  # set by `debug`
# Maskable tokens per row: four steps with a full row, a short row, an empty row and a row with one maskable token,
# which most noise levels leave unmasked; then a step without maskable tokens; then one like the first four.
MASKABLE = [[LENGTH, 9, 0, 1]] * 4 + [[0] * 4] + [[LENGTH, 9, 0, 1]]
STEPS = len(MASKABLE)
# Layouts sum in different orders: float32 rounding.
TOLERANCE = 1e-5


def write_shards(folder, rows):
    """Write rows of (tokens, maskable) arrays as shards; return the flags that train on them."""
    card = replace(read_card("tests/assets/debug/train"), seq_len=LENGTH, sequences=0)
    with ShardWriter(folder, card) as writer:
        for tokens, maskable in rows:
            writer.write(TrainingSequence(tokens, maskable))
    return [
        "--data.train", str(folder), "--data.no_shuffle", "--training.seq_len", str(LENGTH), "--model.flavor", "tiny",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("edge")
    random = np.random.default_rng(0)
    data = write_shards(
        root / "data",
        [(random.integers(4, 512, LENGTH), np.arange(LENGTH) < count) for step in MASKABLE for count in step],
    )
    common = [*data, "--training.steps", str(STEPS)]
    runs = [
        (n, debug(root / name / layout, *common, *options, *args), {"record": str(root / "draws" / name / layout)})
        for name, options in OPTIONS.items()
        for layout, (n, args) in LAYOUTS.items()
    ]
    run_many(runs)
    return root


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_without_a_masked_or_maskable_token_change_nothing(results, name, layout):
    theirs, ours = (scalars(results / name / run) for run in ("single", layout))
    assert set(ours) == set(theirs)
    for key in ours:
        # Hardware FLOPs count padding, which every sequence shard has.
        if key != HARDWARE_FLOPS and key.startswith(
            ("parametric_memory", "diffusion", "loss_metrics/global_avg", "grad_norm")
        ):
            assert set(ours[key]) == set(theirs[key]), key
            for step, value in theirs[key].items():
                assert ours[key][step] == pytest.approx(value, rel=TOLERANCE), f"{key} at step {step}"
    largest, average = (ours[f"loss_metrics/global_{kind}_loss"] for kind in ("max", "avg"))
    for step in range(1, STEPS + 1):
        if layout == "fsdp4" and step != 5:  # the maximum over ranks with maskable tokens
            assert average[step] < largest[step] < float("inf")
        else:
            assert largest[step] == pytest.approx(average[step], rel=TOLERANCE)
    assert set(ours["parametric_memory/skipped_updates"].values()) == {0}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_with_nothing_maskable_is_a_step_without_a_loss(results, name):
    curves = scalars(results / name / "single")
    for key in ("loss_metrics/global_avg_loss", "grad_norm", "diffusion/mask_ratio"):
        assert curves[key][5] == 0 and curves[key][4] > 0 and curves[key][6] > 0, key
    for key in ("fast_weight_norm", "inner_loss_step_1", "relative_write", "anchor_nll_before", "anchor_nll_after"):
        # An average over no set or token is no measurement.
        assert set(curves[f"parametric_memory/{key}"]) == {*range(1, STEPS + 1)} - {5}, key


def test_the_ranks_really_differ(results):
    """One rank of fsdp4 has no maskable token, and another has no masked token at some step."""
    per_rank = []
    for rank in range(4):
        lines = (results / "draws/default/fsdp4" / f"rank{rank}.jsonl").read_text().splitlines()
        samples = [sample for kind, _, sample, _ in map(json.loads, lines) if kind == "level"]
        counts = [MASKABLE[sample // 4][sample % 4] for sample in samples]
        per_rank.append(counts)
        if counts[0] == 1:
            only_first = torch.arange(LENGTH).unsqueeze(0) < 1
            draws = [
                trajectory.draw(SEED, step, torch.tensor([sample]), only_first)
                for step, sample in enumerate(samples, 1)
            ]
            assert any(draw.u_BL[0, 0] >= draw.t_U[0] for draw in draws)
    assert sorted(counts[0] for counts in per_rank) == [0, 1, 9, LENGTH]


def test_a_row_whose_inner_loss_is_not_finite_is_counted(tmp_path):
    """Row 1 reads a NaN embedding in an inner state only; the anchor masks that position."""
    broken, row, step = 300, 1, 1
    random = np.random.default_rng(1)
    tokens = random.integers(4, 256, (4, LENGTH))
    maskable = torch.ones(4, LENGTH, dtype=torch.bool)
    draw = trajectory.draw(SEED, step, torch.arange(4), maskable)
    anchor = trajectory.anchor_state(draw, "linear", "schedule")
    first, second = (state.mask_BL for state in Plan(trajectory="progressive").states(draw, anchor))
    tokens[row, int((anchor.mask_BL & first & ~second)[row].nonzero()[0])] = broken
    data = write_shards(tmp_path / "data", [(x, np.ones(LENGTH, dtype=bool)) for x in tokens])
    common = [
        *data, "--parametric_memory.trajectory", "progressive", "--training.steps", "1", "--checkpoint.enable",
        "--checkpoint.load_only",
    ]  # fmt: skip
    seed = debug(tmp_path / "seed", *data, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    run_many([(1, seed)])

    saved = str(tmp_path / "state.pt")
    dcp_to_torch_save(tmp_path / "seed/checkpoint/step-0", saved)
    state = torch.load(saved, weights_only=False)  # written by this test
    state["tok_embeddings.weight"][broken] = torch.nan
    torch.save(state, saved)
    torch_save_to_dcp(saved, tmp_path / "broken")

    def run(name, processes, local, *start):
        return processes, debug(tmp_path / name, *common, LOCAL, local, *start)

    start = ("--checkpoint.initial_load_path", str(tmp_path / "broken"))
    # All rows have as many maskable tokens, so that the means over tokens and over rows are equal.
    per_row = ("--diffusion.loss_norm", "answer")
    run_many([run("sound", 1, "4"), run("one", 1, "4", *start), run("two", 2, "2", *start, *per_row)])
    sound, one, two = (scalars(tmp_path / name) for name in ("sound", "one", "two"))
    assert sound["parametric_memory/skipped_updates"] == {1: 0}
    for curves in (one, two):
        assert curves["parametric_memory/skipped_updates"] == {1: 1}
        for key in ("loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/inner_loss_step_2"):
            assert 0 < curves[key][1] < float("inf")
            assert curves[key][1] == pytest.approx(one[key][1], rel=TOLERANCE)
        # Inner step 1 is unchanged; inner step 2 excludes the row from its average.
        first, second = (f"parametric_memory/inner_loss_step_{k}" for k in (1, 2))
        assert curves[first][1] == pytest.approx(sound[first][1], rel=TOLERANCE)
        assert curves[second][1] != sound[second][1]
