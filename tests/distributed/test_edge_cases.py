"""Rows that are out of the ordinary, through the real trainer on several ranks."""

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
    "tp2": (2, [LOCAL, "4", "--parallelism.tensor_parallel_degree", "2"]),
}
OPTIONS = {
    "default": [],
    "distilling": [
        "--parametric_memory.inner_loss", "kl", "--parametric_memory.supervision", "newly_revealed",
        "--parametric_memory.inner_steps", "3",
    ],
}  # fmt: skip
SEED = 7  # of `debug`
# Four steps with a whole row, a short one, one with nothing maskable and one with a single maskable token, which
# most noise levels leave alone; then a step with nothing maskable at all; then one as before.
MASKABLE = [[LENGTH, 9, 0, 1]] * 4 + [[0] * 4] + [[LENGTH, 9, 0, 1]]
STEPS = len(MASKABLE)
# Two layouts add up the same numbers in another order: float32 rounding.
TOLERANCE = 1e-5


def write_shards(folder, rows):
    """rows: (tokens, maskable) arrays."""
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
    theirs, ours = (scalars(results / name / which) for which in ("single", layout))
    assert set(ours) == set(theirs)
    for key in ours:
        # The hardware's FLOPs count padding, of which every shard of a sequence has its own.
        if key != HARDWARE_FLOPS and key.startswith(
            ("parametric_memory", "diffusion", "loss_metrics/global_avg", "grad_norm")
        ):
            for step in range(1, STEPS + 1):
                assert ours[key][step] == pytest.approx(theirs[key][step], rel=TOLERANCE), f"{key} at step {step}"
    largest, average = (ours[f"loss_metrics/global_{which}_loss"] for which in ("max", "avg"))
    for step in range(1, STEPS + 1):
        if layout == "fsdp4" and step != 5:  # the largest of the ranks with maskable tokens
            assert average[step] < largest[step] < float("inf")
        else:
            assert largest[step] == pytest.approx(average[step], rel=TOLERANCE)
    assert set(ours["parametric_memory/skipped_updates"].values()) == {0}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_with_nothing_maskable_is_a_step_without_a_loss(results, name):
    found = scalars(results / name / "single")
    for key in (
        "loss_metrics/global_avg_loss",
        "grad_norm",
        "diffusion/mask_ratio",
        "parametric_memory/fast_weight_norm",
    ):
        assert found[key][5] == 0 and found[key][4] > 0 and found[key][6] > 0, key


def test_the_ranks_really_differ(results):
    """Of the four ranks of fsdp4, one has nothing maskable, and one at some step nothing masked."""
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
    """A token whose embedding is broken, where an inner state shows it and the anchor masks it."""
    broken, row, step = 300, 1, 1
    random = np.random.default_rng(1)
    tokens = random.integers(4, 256, (4, LENGTH))
    everything = torch.ones(4, LENGTH, dtype=torch.bool)
    draw = trajectory.draw(SEED, step, torch.arange(4), everything)
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
    state = torch.load(saved, weights_only=False)  # this test's own
    state["tok_embeddings.weight"][broken] = torch.nan
    torch.save(state, saved)
    torch_save_to_dcp(saved, tmp_path / "broken")

    def run(name, processes, local, *start):
        return processes, debug(tmp_path / name, *common, LOCAL, local, *start)

    start = ("--checkpoint.initial_load_path", str(tmp_path / "broken"))
    run_many([run("sound", 1, "4"), run("one", 1, "4", *start), run("two", 2, "2", *start)])
    sound, one, two = (scalars(tmp_path / name) for name in ("sound", "one", "two"))
    assert sound["parametric_memory/skipped_updates"] == {1: 0}
    for found in (one, two):
        assert found["parametric_memory/skipped_updates"] == {1: 1}
        for key in ("loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/inner_loss_step_2"):
            assert 0 < found[key][1] < float("inf")
            assert found[key][1] == pytest.approx(one[key][1], rel=TOLERANCE)
        # The first step is as ever; the second leaves the row out of its average.
        first, second = (f"parametric_memory/inner_loss_step_{k}" for k in (1, 2))
        assert found[first][1] == pytest.approx(sound[first][1], rel=TOLERANCE)
        assert found[second][1] != sound[second][1]
