"""Attention on the accelerator: kernel choice, and document attention against the dense mask."""

import pytest
import torch

from memdlm_dist.compat.torch import TorchDispatchMode, operator_name
from memdlm_dist.method import bilevel
from memdlm_dist.method.documents import PADDING, Documents
from memdlm_dist.method.fast_weight_tree import map_leaves
from memdlm_dist.method.inner_loss import inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.passes import count_passes
from memdlm_dist.method.trajectory import IGNORE_INDEX, Plan
from memdlm_dist.models.attention import BidirectionalAttentionKernel, attention_method, document_mask
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.runtime.device import has_flash_attention
from memdlm_dist.training.objective import Objective
from tests.support.bilevel import scaled_model

# Two rows of documents with padding; one document is a single token, one exceeds flex attention's block of 128.
LENGTHS = ((1, 47, 150, 40), (60, 100, 96))


def documents():
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


# Query heads, key-value heads, head dim.
HEADS = pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (8, 2, 128)], ids=["64", "128"])


@HEADS
@pytest.mark.parametrize("method", ["varlen", "blocks"])
def test_documents_attend_as_the_dense_mask_says(device, flex_without_autotuning, method, heads, kv_heads, head_dim):
    """Forward and backward in bfloat16 with grouped queries and empty slots; the dense mask in float32."""
    number = documents().to(device)
    if method == "varlen" and not has_flash_attention():
        pytest.skip("this accelerator has no flash attention (compute capability 8.0)")
    assert attention_method(device.type, head_dim, torch.float32) == "blocks"
    compare(number, document_mask(Documents(number, number, 8), method), heads, kv_heads, head_dim)


@HEADS
def test_whole_rows_attend_as_the_dense_mask_says(cuda, heads, kv_heads, head_dim):
    """Rows of one document use unmasked kernels, which take grouped queries without expanding them."""
    number = torch.zeros(2, 256, dtype=torch.int64, device=cuda)
    with AttentionOperators() as operators:
        compare(number, None, heads, kv_heads, head_dim)
    ours = operators.names[:2]
    assert ours[0] in FAST and ours[1] == f"{ours[0]}_backward"


def compare(number, mask, heads, kv_heads, head_dim):
    """Assert that bfloat16 attention with `mask` equals float32 attention with the dense mask of `number`.

    The tolerance is 2% of the largest value: bfloat16 carries 8 bits, and both probabilities and output are rounded to
    it. Attention beyond a document would differ by as much as the values themselves.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        x = torch.randn(*number.shape, heads, head_dim, generator=generator)
        return x.to(number.device, torch.bfloat16).transpose(1, 2)  # strided like the projections' output

    inputs, upstream = [normal(heads), normal(kv_heads), normal(kv_heads)], normal(heads)
    results = []
    for dtype, used in ((torch.bfloat16, mask), (torch.float32, document_mask(Documents(number, number, 8), "dense"))):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        y = BidirectionalAttentionKernel()(*leaves, enable_gqa=True, mask=used)
        results.append([y, *torch.autograd.grad(y, leaves, upstream.type_as(y))])
    for name, ours, theirs in zip(("output", "query", "key", "value"), *results, strict=True):
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max(), name


def test_a_packed_step_is_the_cpus(device, flex_without_autotuning):
    """Same loss, inner losses and gradients in float32, with blocks on the device and a dense mask on the CPU."""
    args = LLaDAArgs(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=96, vocab_size=128, max_seq_len=256)
    memory = bilevel.Memory(
        1, args.adapted_linears(1, ["ffn", "attention"]), "lora", 4, 8.0,
        inner_loss("cross_entropy", "pre_final_norm", "post_final_norm"), InnerSGD(0.1, 1.0), samples_per_set=1,
    )  # fmt: skip
    number = documents()
    tokens = torch.randint(0, 127, number.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.where(number == PADDING, IGNORE_INDEX, tokens)
    batch = Objective(127, Plan(), memory, seed=0, tp_size=1, tp_rank=0).micro_batch(
        tokens, labels, torch.tensor([3, 8]), step=1, documents_BL=number
    )
    start = memory.draw(0, 1, batch.sample_ids_U)

    def step(target):
        model = scaled_model(args, torch.float32).to(target)
        fast = map_leaves(lambda x: x.to(target), start)
        loss, statistics = bilevel.outer_loss(model, batch.to(target), memory, fast)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return grads | {"loss": loss.detach(), "inner losses": statistics.loss_KG, "written": statistics.written_norm_G}

    ours, theirs = step(device), step("cpu")
    for name, x in theirs.items():
        # Summation order differs: 1e-6 of the largest term, amplified by the inner loop and two layers.
        assert (ours[name].cpu() - x).abs().max() < 1e-4 * x.abs().max(), name


class AttentionOperators(TorchDispatchMode):
    """Recorder of the attention operators that run while active."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "scaled_dot_product" in (name := operator_name(operator)):
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


FAST = ("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention")


def test_whole_rows_are_attended_to_by_cudnn_or_flash_kernels(cuda, build):
    """Kernels of cuDNN or flash attention run in every pass of a bfloat16 step, forward and backward.

    Other kernels have other operator names; the math kernel, which stores all scores, consists of matrix products.
    """
    bench = build("--model.flavor", "quickstart", "--training.mixed_precision_param", "bfloat16")
    batch = bench.batch(0)
    with AttentionOperators() as forward:
        loss, _ = bench.loss_sum("ours", batch, 1)
    with AttentionOperators() as backward:
        loss.backward()
    assert set(forward.names) <= {*FAST} and set(backward.names) <= {f"{name}_backward" for name in FAST}
    passes, layers = count_passes(batch), bench.args.n_layers
    tail = layers - bench.objective.memory.first_layer
    assert tail == 1, "inner backward passes end at the FFN's fast weights, above the layer's attention"
    assert len(forward.names) == passes.inputs * (layers - tail) + passes.tail_forward * tail
    assert len(backward.names) == layers


def test_deterministic_attention_is_flash_attention_and_has_the_same_bits_each_time(cuda):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 4, 512, 64, generator=generator).to(cuda, torch.bfloat16) for _ in range(4)]
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
            with AttentionOperators() as operators:
                y = BidirectionalAttentionKernel()(q, k, v)
                results.append([y, *torch.autograd.grad(y, [q, k, v], tensors[3])])
            assert operators.names == [FAST[1], f"{FAST[1]}_backward"]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
