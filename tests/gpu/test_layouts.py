"""Layouts on several accelerators match one accelerator, over NCCL and through launch/train.sh."""

import pytest
import torch

from memdlm_dist.runtime.device import has_grouped_mm
from tests.support.launching import launch, scalars

STEPS = 3
COMMON = ["--training.steps", str(STEPS), "--training.global_batch_size", "4"]
LOCAL, SHARD = "--training.local_batch_size", "--parallelism.data_parallel_shard_degree"
TP, CP = "--parallelism.tensor_parallel_degree", "--parallelism.context_parallel_degree"
# The initial weights of this flavour are large enough for attention to matter.
DENSE = ["--model.flavor", "needle"]
BFLOAT16 = [*DENSE, "--training.mixed_precision_param", "bfloat16"]
# Expert-parallel ranks share one set of fast weights, like a single rank with all rows.
EXPERTS = ["--model.name", "llada2", "--parametric_memory.granularity", "batch"]
# name -> (ranks, arguments, the single-rank layout to compare with)
LAYOUTS = {
    "one": (1, [*DENSE, LOCAL, "4"], ""),
    "fsdp2": (2, [*DENSE, LOCAL, "2"], "one"),
    "tp2": (2, [*DENSE, LOCAL, "4", TP, "2"], "one"),
    "cp2": (2, [*DENSE, LOCAL, "4", CP, "2"], "one"),
    "hsdp2x2": (4, [*DENSE, LOCAL, "1", "--parallelism.data_parallel_replicate_degree", "2", SHARD, "2"], "one"),
    "fsdp2-tp2": (4, [*DENSE, LOCAL, "2", SHARD, "2", TP, "2"], "one"),
    # bfloat16, because flash and cuDNN kernels have no float32; only CUDA has ring attention.
    "one-bf16": (1, [*BFLOAT16, LOCAL, "4"], ""),
    "cp2-ring": (2, [*BFLOAT16, LOCAL, "4", CP, "2", "--parallelism.context_parallel_method", "ring"], "one-bf16"),
    "experts": (1, [*EXPERTS, LOCAL, "4"], ""),
    "ep2": (2, [*EXPERTS, LOCAL, "2", "--parallelism.expert_parallel_degree", "2"], "experts"),
}
TRACKED = (
    "loss_metrics/global_avg_loss", "grad_norm", "parametric_memory/inner_loss_step_1",
    "parametric_memory/inner_loss_step_2", "parametric_memory/fast_weight_norm",
)  # fmt: skip
# (for losses, for norms). float32: summation order differs, 1e-5 measured on CPUs, amplified by optimizer steps.
# Experts: grouped products are bfloat16, which carries 8 bits. bfloat16: FSDP2 casts all parameters, while one rank's
# autocast keeps norms and the residual stream in float32; 2e-4 and 2e-3 measured on CPUs. A ring whose ranks attend
# only to their own tokens is 3e-3 and 3e-2 away.
FLOAT32_TOLERANCE = (1e-4, 1e-4)
TOLERANCES = {"one": FLOAT32_TOLERANCE, "experts": (0.03, 0.03), "one-bf16": (1e-3, 0.01)}


@pytest.fixture(scope="module")
def run(device, tmp_path_factory):
    """Return a function from a layout to its scalars; each layout runs once."""
    root, results = tmp_path_factory.mktemp("layouts"), {}

    def scalars_of(layout):
        ranks, arguments, _ = LAYOUTS[layout]
        if layout not in results:
            launch(ranks, root / layout, *COMMON, *arguments)
            results[layout] = scalars(root / layout)
        return results[layout]

    return scalars_of


@pytest.mark.parametrize("layout", [name for name, (ranks, _, _) in LAYOUTS.items() if ranks > 1])
def test_a_layout_takes_the_steps_of_one_accelerator(run, request, layout):
    ranks, arguments, reference = LAYOUTS[layout]
    if (devices := torch.accelerator.device_count()) < ranks:
        pytest.skip(f"needs {'two' if ranks == 2 else 'four'} GPUs, and this machine has {devices}")
    if "ring" in arguments:
        request.getfixturevalue("cuda")
    loss_tolerance, norm_tolerance = TOLERANCES[reference]
    if reference == "experts" and has_grouped_mm():
        request.getfixturevalue("compiler")
    elif reference == "experts":  # a loop in float32
        loss_tolerance, norm_tolerance = FLOAT32_TOLERANCE
    ours, theirs = run(layout), run(reference)
    for name in TRACKED:
        assert set(ours[name]) == set(theirs[name]) == set(range(1, STEPS + 1))
        tolerance = norm_tolerance if name.endswith("norm") else loss_tolerance
        for step, value in theirs[name].items():
            assert ours[name][step] == pytest.approx(value, rel=tolerance), f"{name} at step {step}"
