"""One step on the accelerator: no device-to-host sync, and compiled blocks equal eager ones."""

from contextlib import contextmanager

import pytest
import torch

from memdlm_dist.compat.torch import tree_leaves
from memdlm_dist.config import parse_config
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.runtime.device import has_grouped_mm
from memdlm_dist.training.backbone import get_layout, get_model_args
from tests.support import trainer
from tests.workers import sharded_step, skipped_steps

COMMON = [
    "--job.config_file", "train_configs/debug.toml", "--training.mixed_precision_param", "bfloat16",
    "--optimizer.implementation", "fused", "--metrics.log_freq", "1000", "--metrics.no_enable_tensorboard",
]  # fmt: skip
FULL_CHECKPOINTING = ["--activation_checkpoint.mode", "full"]
PACKED = ["--model.flavor", "quickstart", "--training.seq_len", "256", "--training.local_batch_size", "2"]
INDUCTOR = ["--compile.enable", "--compile.backend", "inductor"]
KINDS = {
    "dense": ["--model.flavor", "quickstart", *FULL_CHECKPOINTING],
    "packed": PACKED,
    "experts": ["--model.name", "llada_moe"],
    "experts, compiled": ["--model.name", "llada_moe", *INDUCTOR],
    # With trained biases of the experts.
    "experts, balanced": ["--model.name", "llada2", "--model.load_balance_coeff", "0.001", *INDUCTOR],
}


@contextmanager
def sync_debug_mode(mode):
    """Set torch's reaction to a device-to-host sync: "error", or "default" for none."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_does_not_wait_in_a_step(cuda, one_rank, request, kind):
    """No sync in a bfloat16 `train_step` without logging, from the batch to the optimizer.

    Two steps come first, because building graphs, workspaces, optimizer states and kernels does synchronise.
    """
    if kind.startswith("experts") and not has_grouped_mm():
        pytest.skip("without grouped products the experts are a loop, which reads their numbers of tokens on the host")
    request.getfixturevalue({"dense": "device", "packed": "flex_without_autotuning"}.get(kind, "compiler"))
    config = parse_config.parse([*COMMON, *KINDS[kind]])
    sizes, dims = get_model_args(config), get_layout(config, 1)
    trained = trainer.build(config, sizes, dims, cuda.type)
    batches = [[trainer.batch(config, sizes, i, packed=kind == "packed")] for i in range(3)]

    def step(number):
        trainer.step(trained, number + 2, batches[number])  # the first step logs

    step(0), step(1)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    with sync_debug_mode("error"):
        step(2)  # reads the previous step's consensus flags, and its own only in `finish`
    trained.consensus.finish()
    assert trained.consensus.skipped == 0
    for name, p in trained.model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    with pytest.raises(RuntimeError, match="synchronizing"), sync_debug_mode("error"):
        before["output.weight"].sum().item()  # the detector works


def test_a_step_that_is_not_finite_changes_nothing_before_the_host_knows(cuda, one_rank):
    config = parse_config.parse([*COMMON, *KINDS["dense"], "--reliability.on_nonfinite", "skip"])
    sizes, dims = get_model_args(config), get_layout(config, 1)
    trained = trainer.build(config, sizes, dims, cuda.type)
    trained.objective = skipped_steps.Poisoned(**vars(trained.objective), steps=(3,))
    skipped = []
    for number in (2, 3, 4):
        before = skipped_steps.state(trained)
        trainer.step(trained, number, [trainer.batch(config, sizes, number)])
        assert skipped_steps.same(skipped_steps.state(trained), before) == (number == 3)
        skipped.append(trained.consensus.skipped)
    assert skipped == [0, 0, 1]


def test_a_micro_batch_arrives_as_it_was(cuda, build):
    bench = build(*PACKED)
    tokens, labels, ids, documents, _ = trainer.batch(bench.config, bench.args, 0, packed=True)
    on_host = bench.objective.micro_batch(tokens, labels, ids, 1, documents_BL=documents)
    arrived = on_host.to(cuda)
    pairs = list(zip(tree_leaves(arrived), tree_leaves(on_host), strict=True))
    assert len(pairs) > 10 and all(a.device.type == cuda.type for a, b in pairs if isinstance(b, torch.Tensor))
    for a, b in pairs:
        assert torch.equal(a.cpu(), b) if isinstance(b, torch.Tensor) else a == b


# float32: compiled blocks sum in another order, a few 1e-6, amplified by the inner loop. bfloat16 carries 8 bits: eager
# operators round every result, while compiled blocks keep some in float32; 0.01 of a quantity's largest value measured
# on a CPU.
COMPILED = {  # dtype -> (arguments, tolerance)
    "float32": ([], 1e-4),
    "bfloat16": (FULL_CHECKPOINTING, 0.03),
}


@pytest.mark.parametrize("dtype", COMPILED)
def test_compiled_blocks_give_the_eager_loss_and_gradients(one_rank, compiler, dtype):
    arguments, tolerance = COMPILED[dtype]
    eager, compiled = (
        sharded_step.step(sharded_step.build(dtype, [*arguments, *more]), "ours", None) for more in ([], INDUCTOR)
    )
    compiled = {name.replace("_orig_mod.", ""): x for name, x in compiled.items()}
    assert compiled.keys() == eager.keys() and "gradient of output.weight" in eager
    assert sharded_step.difference(compiled, eager) < tolerance


@pytest.mark.parametrize("backbone", ["llada_moe", "llada2"])
def test_experts_compiled_around_give_the_eager_loss_and_gradients(build, compiler, backbone):
    """float32 with experts as a loop; no routing triggers a compilation after the second step."""
    arguments = ["--model.name", backbone, "--training.mixed_precision_param", "float32", *FULL_CHECKPOINTING]
    benches = [build(*arguments, *more) for more in ([], INDUCTOR)]
    for mixture in (mixture for bench in benches for mixture in bench.model.mixtures()):
        mixture.experts.use_grouped_mm = False
    eager, compiled = (sharded_step.step(bench, "ours", None) for bench in benches)
    assert sharded_step.difference(compiled, eager) < COMPILED["float32"][1]
    torch._dynamo.reset()
    result = sharded_step.compilations(benches[1], "ours")
    assert result["breaks"] == {}
    assert result["graphs"][0] >= 1 and result["graphs"][1:] == [result["graphs"][1]] * 3


class PackedBench(Bench):
    """Bench on packed rows."""

    def batch(self, number):
        tokens, labels, ids, documents, _ = trainer.batch(self.config, self.args, number, packed=True)
        batch = self.objective.micro_batch(tokens, labels, ids, number, documents_BL=documents)
        return batch.to(self.model.tok_embeddings.weight.device)


@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_nothing_is_compiled_after_the_second_step(build, flex_without_autotuning, kind, rows):
    unpacked = rows == "whole"
    bench = sharded_step.build("float32", INDUCTOR) if unpacked else PackedBench(**vars(build(*PACKED, *INDUCTOR)))
    torch._dynamo.reset()  # start without compiled graphs, as a fresh run does
    result = sharded_step.compilations(bench, kind)
    assert result["breaks"] == {}
    assert result["graphs"][0] >= 1 and result["graphs"][1:] == [result["graphs"][1]] * 3
