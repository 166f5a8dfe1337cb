"""One step on the accelerator: the host never waits for it, and compiled blocks compute what eager ones do."""

from contextlib import contextmanager

import pytest
import torch

from memdlm_dist.method.documents import FILL
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.runtime.device import has_grouped_mm
from tests.workers import sharded_step

BFLOAT16 = ["--training.mixed_precision_param", "bfloat16"]
KINDS = {
    "dense": ["--model.flavor", "quickstart"],
    "packed": ["--model.flavor", "quickstart", "--training.seq_len", "256", "--training.local_batch_size", "2"],
    "experts": ["--model.name", "llada_moe"],
}


@contextmanager
def refusing_to_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed_batch(bench, number):
    """Random tokens in three documents a row and some padding, divided differently in every row and batch."""
    training = bench.config.training
    shape = training.local_batch_size, training.seq_len
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, bench.args.vocab_size - 1, shape, generator=generator)
    cuts = torch.randint(10, 70, (len(tokens), 3), generator=generator).cumsum(1)
    documents = (torch.arange(training.seq_len) >= cuts.unsqueeze(-1)).sum(1)
    documents[documents == 3] = FILL
    labels = torch.where(documents == FILL, IGNORE_INDEX, tokens)
    batch = bench.objective.micro_batch(tokens, labels, torch.arange(len(tokens)), step=number, documents_BL=documents)
    return batch.to(bench.model.tok_embeddings.weight.device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_does_not_wait_in_a_step(cuda, build, flex_without_autotuning, kind):
    """Forward pass, inner loop and backward pass, in bfloat16.

    The batch is on the device before: it lies in pageable memory, for whose transfer the host waits in any case. Two
    steps come first, for what is built on first use: graphs, workspaces and kernels, whose builders do wait.
    """
    if kind == "experts" and not has_grouped_mm():
        pytest.skip("without grouped products the experts are a loop, which reads their numbers of tokens on the host")
    bench = build(*KINDS[kind], *BFLOAT16)
    batches = [packed_batch(bench, i) if kind == "packed" else bench.batch(i) for i in range(3)]

    def step(number):
        loss, statistics = bench.loss_sum("ours", batches[number], number)
        (loss / batches[number].maskable).backward()
        return loss, statistics

    step(0), step(1)
    with refusing_to_wait():
        loss, statistics = step(2)
    assert loss.isfinite() and statistics.counted_KG.all() and statistics.written_norm_G.min() > 0
    with pytest.raises(RuntimeError, match="synchronizing"), refusing_to_wait():
        loss.item()  # the detector works


# A compiled block adds up in another order than PyTorch's kernels do: a few 1e-6 in float32, which the inner loop
# amplifies. A wrong term would be 1e-2.
COMPILED_TOLERANCE = 1e-4
INDUCTOR = ["--compile.enable", "--compile.backend", "inductor"]


def test_compiled_blocks_give_the_eager_loss_and_gradients(one_rank):
    eager, compiled = (
        sharded_step.step(sharded_step.build("float32", arguments), "ours", None) for arguments in ([], INDUCTOR)
    )
    compiled = {name.replace("_orig_mod.", ""): x for name, x in compiled.items()}
    assert compiled.keys() == eager.keys() and "gradient of layers.4.feed_forward.w2.weight" in eager
    assert sharded_step.difference(compiled, eager) < COMPILED_TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_nothing_is_compiled_after_the_second_step(one_rank, kind):
    torch._dynamo.reset()  # from nothing, as in a run of its own
    found = sharded_step.compilations(sharded_step.build("float32", INDUCTOR), kind)
    assert found["breaks"] == {}
    assert found["graphs"][0] >= 1 and found["graphs"][1:] == [found["graphs"][1]] * 3
