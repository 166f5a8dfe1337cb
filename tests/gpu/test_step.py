"""One step on the accelerator: the host never waits for it, and compiled blocks compute what eager ones do."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from memdlm_dist.config import parse_config
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.runtime.device import has_grouped_mm
from memdlm_dist.training.agreement import StepAgreement
from memdlm_dist.training.backbone import layout_of, sizes_of
from memdlm_dist.training.trainer import MemDLMTrainer
from tests.support import trainer
from tests.workers import sharded_step

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
}
# What waits by design: the transfers of the batch, which lies in pageable memory, and the flags of all ranks.
WAITS = [(MicroBatch, "to"), (MemDLMTrainer, "_count"), (StepAgreement, "reach")]


@contextmanager
def sync_debug_mode(mode):
    """Say what happens where the host waits for the device: "error", or "default" for nothing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def let_wait(monkeypatch, counted):
    """Let the functions of `WAITS` wait, and count their calls."""

    def waiting(name, function):
        def wait(*arguments):
            counted[name] += 1
            with sync_debug_mode("default"):
                return function(*arguments)

        return wait

    for owner, name in WAITS:
        monkeypatch.setattr(owner, name, waiting(name, getattr(owner, name)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_does_not_wait_in_a_step(cuda, one_rank, monkeypatch, request, kind):
    """The whole of `train_step` without logging, in bfloat16: noise to optimizer, but for `WAITS`.

    Two steps come first, for what is built on first use: graphs, workspaces, optimizer states and kernels, whose
    builders do wait.
    """
    if kind.startswith("experts") and not has_grouped_mm():
        pytest.skip("without grouped products the experts are a loop, which reads their numbers of tokens on the host")
    request.getfixturevalue({"dense": "device", "packed": "flex_without_autotuning"}.get(kind, "compiler"))
    config = parse_config.parse([*COMMON, *KINDS[kind]])
    sizes, dims = sizes_of(config), layout_of(config, 1)
    trained = trainer.build(config, sizes, dims, cuda.type)
    batches = [[trainer.batch(config, sizes, i, packed=kind == "packed")] for i in range(3)]

    def step(number):
        trainer.step(trained, number + 2, batches[number])  # the first step logs

    step(0), step(1)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    waited = Counter()
    let_wait(monkeypatch, waited)
    with sync_debug_mode("error"):
        step(2)
    assert waited == {name: 1 for _, name in WAITS} and trained.agreement.skipped == 0
    for name, p in trained.model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    with pytest.raises(RuntimeError, match="synchronizing"), sync_debug_mode("error"):
        before["output.weight"].sum().item()  # the detector works


# A compiled block adds up in another order than PyTorch's kernels do: a few 1e-6 in float32, which the inner loop
# amplifies. In bfloat16, of 8 bits, eager operators round each result, of which a compiled block keeps some in float32:
# 0.01 of a quantity's largest value is seen on a CPU.
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


def test_experts_compiled_around_give_the_eager_loss_and_gradients(build, compiler):
    """In float32, the experts as a loop; and nothing is compiled after the second step, whatever the routing."""
    arguments = ["--model.name", "llada_moe", "--training.mixed_precision_param", "float32", *FULL_CHECKPOINTING]
    benches = [build(*arguments, *more) for more in ([], INDUCTOR)]
    for mixture in (mixture for bench in benches for mixture in bench.model.mixtures()):
        mixture.experts.use_grouped_mm = False
    eager, compiled = (sharded_step.step(bench, "ours", None) for bench in benches)
    assert sharded_step.difference(compiled, eager) < COMPILED["float32"][1]
    torch._dynamo.reset()
    found = sharded_step.compilations(benches[1], "ours")
    assert found["breaks"] == {}
    assert found["graphs"][0] >= 1 and found["graphs"][1:] == [found["graphs"][1]] * 3


class PackedBench(Bench):
    """A bench whose rows are packed."""

    def batch(self, number):
        inputs, labels = trainer.batch(self.config, self.args, number, packed=True)
        tokens, ids, documents = (inputs[name] for name in ("input", "sample_id", "documents"))
        batch = self.objective.micro_batch(tokens, labels, ids, number, documents_BL=documents)
        return batch.to(self.model.tok_embeddings.weight.device)


@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_nothing_is_compiled_after_the_second_step(build, flex_without_autotuning, kind, rows):
    whole = rows == "whole"
    bench = sharded_step.build("float32", INDUCTOR) if whole else PackedBench(**vars(build(*PACKED, *INDUCTOR)))
    torch._dynamo.reset()  # from nothing, as in a run of its own
    found = sharded_step.compilations(bench, kind)
    assert found["breaks"] == {}
    assert found["graphs"][0] >= 1 and found["graphs"][1:] == [found["graphs"][1]] * 3
