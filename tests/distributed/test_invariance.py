"""Curves and random draws of 20 steps do not depend on the number and layout of ranks."""

import json

import pytest

from tests.support.launching import debug, run_many, scalars

STEPS = 20
# Summation order, amplified by 20 steps: 2e-7 measured in the loss, 2e-6 in the norm.
TOLERANCE = 1e-4

TP = "--parallelism.tensor_parallel_degree"
LOCAL = "--training.local_batch_size"
# name -> (processes, tp_size, arguments); the global batch size is 4 everywhere.
LAYOUTS = {
    "single": (1, 1, [LOCAL, "4"]),
    "fsdp2": (2, 1, [LOCAL, "2"]),
    "fsdp4": (4, 1, [LOCAL, "1"]),
    "tp2": (2, 2, [LOCAL, "4", TP, "2"]),
    "fsdp2-tp2": (4, 2, [LOCAL, "2", TP, "2"]),
    "hsdp2x2": (4, 1, [LOCAL, "1", "--parallelism.data_parallel_replicate_degree", "2"]),
    "accumulation2-on-half-the-ranks": (2, 1, [LOCAL, "1"]),
}
VARIANTS = {
    f"{adapter}-{'-'.join(targets)}": [
        "--parametric_memory.adapter", adapter, "--parametric_memory.target_modules", ",".join(targets),
    ]
    for adapter in ("lora", "full")
    for targets in (("ffn",), ("ffn", "attention"))
}  # fmt: skip
RECORDED = "lora-ffn-attention"
SOME = ("single", "fsdp2-tp2", "hsdp2x2")


@pytest.fixture(
    scope="module",
    params=[(RECORDED, SOME), *(pytest.param((v, tuple(LAYOUTS)), marks=pytest.mark.slow) for v in VARIANTS)],
    ids=lambda chosen: f"{chosen[0]} on {len(chosen[1])}",
)
def variant(request, tmp_path_factory):
    """Return name, layouts and folder of a variant's runs from scratch.

    By default one variant runs on some layouts; -m slow runs all variants on all layouts.
    """
    name, layouts = request.param
    root = tmp_path_factory.mktemp(name)
    common = ["--model.flavor", "tiny", "--training.steps", str(STEPS), "--training.global_batch_size", "4"]
    runs = []
    for layout in layouts:
        processes, _, arguments = LAYOUTS[layout]
        run = (processes, debug(root / layout, *common, *VARIANTS[name], *arguments))
        runs.append((*run, {"record": str(root / "draws" / layout)}) if name == RECORDED else run)
    run_many(runs)
    return name, layouts, root


def test_every_layout_gives_the_same_curve(variant):
    _, layouts, root = variant
    reference = scalars(root / "single")
    for layout in layouts:
        ours = scalars(root / layout)
        for name in (
            "loss_metrics/global_avg_loss", "grad_norm", "diffusion/mask_ratio", "parametric_memory/fast_weight_norm",
            "parametric_memory/inner_loss_step_1", "parametric_memory/inner_loss_step_2",
            "parametric_memory/inner_grad_norm_step_1", "parametric_memory/inner_grad_norm_step_2",
        ):  # fmt: skip
            assert set(ours[name]) == set(range(1, STEPS + 1))
            for step, value in reference[name].items():
                assert ours[name][step] == pytest.approx(value, rel=TOLERANCE), f"{layout}: {name} at step {step}"
    losses = list(reference["loss_metrics/global_avg_loss"].values())
    assert abs(losses[-1] - losses[0]) > 0.01, "training changes the loss"


def test_draws_are_the_same_on_every_rank_and_for_every_number_of_ranks(variant):
    """Noise level, masks and A have one value per step and sample, on any rank."""
    name, layouts, root = variant
    if name != RECORDED:
        return
    digests_by_key = {}
    for layout in layouts:
        processes, tp_size, _ = LAYOUTS[layout]
        drawn = {}
        for rank in range(processes):
            lines = (root / "draws" / layout / f"rank{rank}.jsonl").read_text().splitlines()
            for kind, step, sample, digest in map(json.loads, lines):
                drawn.setdefault((kind, step, sample), []).append(digest)
        # 4 samples a step, each on one data-parallel rank and so on all tp_size ranks of its TP group.
        assert len(drawn) == 3 * STEPS * 4 and {len(digests) for digests in drawn.values()} == {tp_size}
        for key, digests in drawn.items():
            digests_by_key.setdefault(key, set()).update(digests)
    assert len(digests_by_key) == 3 * STEPS * 4, "every layout sees the same samples at the same steps"
    assert all(len(digests) == 1 for digests in digests_by_key.values())
    # Values differ between steps and samples.
    for kind in ("level", "states", "A"):
        assert len({next(iter(d)) for key, d in digests_by_key.items() if key[0] == kind}) == STEPS * 4
