"""The number and the arrangement of the ranks do not change the experiment: curves and draws of 20 steps."""

import json

import pytest
from launching import debug, from_one_seed, run_many, scalars

STEPS = 20
# What 20 steps make of adding up the same numbers in another order (2e-7 is seen in the loss, 2e-6 in the norm).
TOLERANCE = 1e-4

TP = "--parallelism.tensor_parallel_degree"
LOCAL = "--training.local_batch_size"
# name -> (processes, tensor-parallel degree, arguments); the global batch is 4 everywhere.
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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs everything from one seed checkpoint."""
    root = tmp_path_factory.mktemp("invariance")
    seed, common = from_one_seed(
        root, "--model.flavor", "tiny", "--training.steps", str(STEPS), "--training.global_batch_size", "4"
    )
    runs = [seed]
    for variant, options in VARIANTS.items():
        for layout, (processes, _, arguments) in LAYOUTS.items():
            run = (processes, debug(root / variant / layout, *common, *options, *arguments))
            runs.append((*run, {"record": str(root / "draws" / layout)}) if variant == RECORDED else run)
    run_many(runs)
    return root


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_gives_the_same_curve(root, variant, layout):
    reference, ours = scalars(root / variant / "single"), scalars(root / variant / layout)
    for name in (
        "loss_metrics/global_avg_loss", "grad_norm", "diffusion/mask_ratio", "parametric_memory/fast_weight_norm",
        "parametric_memory/inner_loss_step_1", "parametric_memory/inner_loss_step_2",
        "parametric_memory/inner_grad_norm_step_1", "parametric_memory/inner_grad_norm_step_2",
    ):  # fmt: skip
        assert set(ours[name]) == set(range(1, STEPS + 1))
        for step, value in reference[name].items():
            assert ours[name][step] == pytest.approx(value, rel=TOLERANCE), f"{name} at step {step}"


def test_the_variants_are_different_experiments(root):
    curves = [
        tuple(scalars(root / variant / "single")["loss_metrics/global_avg_loss"].values()) for variant in VARIANTS
    ]
    assert len({curve[0] for curve in curves}) == len(VARIANTS), "each variant writes another memory"
    assert all(abs(curve[-1] - curve[0]) > 0.01 for curve in curves)


def test_draws_are_the_same_on_every_rank_and_for_every_number_of_ranks(root):
    """Noise levels, masks and A: one value for each step and sample, whoever computes it."""
    everything = {}
    for layout, (processes, tensor, _) in LAYOUTS.items():
        found = {}
        for rank in range(processes):
            lines = (root / "draws" / layout / f"rank{rank}.jsonl").read_text().splitlines()
            for kind, step, sample, digest in map(json.loads, lines):
                found.setdefault((kind, step, sample), []).append(digest)
        # 4 samples a step, each on one data-parallel rank, which is as many ranks as the TP group has.
        assert len(found) == 3 * STEPS * 4 and {len(digests) for digests in found.values()} == {tensor}
        for key, digests in found.items():
            everything.setdefault(key, set()).update(digests)
    assert len(everything) == 3 * STEPS * 4, "every layout sees the same samples at the same steps"
    assert all(len(digests) == 1 for digests in everything.values())
    # Levels, and so on: not one value throughout.
    for kind in ("level", "states", "A"):
        assert len({next(iter(d)) for key, d in everything.items() if key[0] == kind}) == STEPS * 4
