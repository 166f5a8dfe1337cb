"""Chunked losses of the output head against torch's functions on full logits."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memdlm_dist.method import logit_loss
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy, kl, reverse_kl, set_losses, smoothed_cross_entropy
from memdlm_dist.performance.estimate import chunk_bytes
from memdlm_dist.performance.straightforward import DISTANCES
from tests.support import ranks

N, D, V = 37, 16, 101
LOSSES = (cross_entropy, kl, reverse_kl)


def problem(n_sets, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(N, D, dtype=dtype, generator=generator) for _ in range(2))
    weight = torch.randn(V, D, dtype=dtype, generator=generator)
    coefficient = torch.rand(N, dtype=dtype, generator=generator)
    coefficient[5:9] = 0  # padding
    sets = torch.randint(n_sets, (N,), generator=generator)
    label = torch.randint(V, (N,), generator=generator)
    # Only the outer loss trains the head, and it has one set.
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(n_sets == 1),
        teacher,
        label,
        SetSum(coefficient, sets, n_sets),
    )


@pytest.mark.parametrize("loss, temperature", [*((loss, 1.0) for loss in LOSSES), (kl, 4.0), (reverse_kl, 0.5)])
@pytest.mark.parametrize("rows", [1, 10, N, 1000])
@pytest.mark.parametrize("n_sets", [1, 3])
def test_losses_and_gradients_equal_those_of_whole_logits(monkeypatch, loss, temperature, rows, n_sets):
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", rows * V * 8)
    hidden, weight, teacher, label, sums = problem(n_sets)
    target = label if loss is cross_entropy else teacher
    # Distinct upstream gradients per set.
    factor = torch.arange(1.0, n_sets + 1, dtype=torch.float64)
    inputs = [hidden, weight] if n_sets == 1 else [hidden]

    target_logits = label if loss is cross_entropy else teacher @ weight.detach().T / temperature
    expected = sums(temperature**2 * DISTANCES[loss](hidden @ weight.T / temperature, target_logits))
    expected_gradients = torch.autograd.grad((factor * expected).sum(), inputs)
    ours = set_losses(hidden, weight, HeadLoss(loss, target, sums, temperature))
    gradients = torch.autograd.grad((factor * ours).sum(), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for our_gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(our_gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_cross_entropy_equals_the_librarys_own_chunked_function():
    hidden, weight, _, label, sums = problem(1, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=10, chunking_method=None)
    theirs = sums(F.linear_cross_entropy(hidden, weight, label, reduction="none", options=options))
    ours = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    # float32 rounding of sums over 37 terms.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), [hidden, weight]) for x in (ours, theirs)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bfloat16_loses_no_more_than_its_products_do():
    hidden, weight, _, label, sums = problem(1, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    sums = sums._replace(coefficient_N=sums.coefficient_N.float())
    expected = sums(F.cross_entropy(exact[0] @ exact[1].T, label, reduction="none"))
    losses = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.01, atol=0.0)  # bfloat16 carries 8 bits
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), [hidden, weight]), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert F.cosine_similarity(ours.float().flatten(), theirs.flatten(), 0) > 0.999


class LargestTensor(TorchDispatchMode):
    """Largest number of elements that an operator has returned."""

    elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        sizes = (x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("loss", LOSSES)
def test_whole_logits_never_exist(monkeypatch, loss):
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", 10 * V * 8)
    hidden, weight, teacher, label, sums = problem(1)
    head = HeadLoss(loss, label if loss is cross_entropy else teacher, sums)
    with LargestTensor() as largest:
        set_losses(hidden, weight, head).backward()
    # Chunks of 10 rows (student and teacher stacked where a reduction takes both), and the weight's gradient.
    assert largest.elements <= max(2 * 10 * V, V * D) < N * V
    with LargestTensor() as largest:
        (hidden @ weight.T).sum()
    assert largest.elements == N * V, "the detector works"


def test_chunks_are_as_large_as_said_at_a_real_vocabulary():
    vocabulary, tokens = 126_464, 700
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    sums = SetSum(torch.ones(tokens), torch.zeros(tokens, dtype=torch.int64), 1)
    with LargestTensor() as largest:
        set_losses(hidden, weight, HeadLoss(cross_entropy, torch.arange(tokens), sums)).backward()
    assert tokens * vocabulary > largest.elements == 384 * vocabulary, "two chunks, of 384 and 316 rows"
    assert largest.elements * 4 <= logit_loss.CHUNK_BYTES


@pytest.mark.parametrize(
    "tokens, vocabulary, dtype, rows",
    [
        (16_384, 126_464, torch.bfloat16, 512),
        (514, 126_464, torch.float32, 384),  # two chunks, the last one smaller
        (100, 126_464, torch.float32, 128),
        (16_384, 126_464, torch.float64, 256),
        (1000, 1_000_000, torch.bfloat16, 67),  # 128 rows exceed the limit
    ],
)
def test_chunks_are_multiples_of_128_rows_where_these_are_within_the_limit(tokens, vocabulary, dtype, rows):
    assert logit_loss.chunk_length(tokens, vocabulary, dtype) == rows


@pytest.mark.parametrize("rows", [3, 10])
def test_the_weights_gradient_is_rounded_once_over_all_chunks(monkeypatch, rows):
    """Compare with the float64 product of logit gradients that are exact in bfloat16."""
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", rows * V * 4)
    hidden, weight, _, _, sums = problem(1, torch.bfloat16)
    gradient = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).bfloat16()

    def given(logits, row, vocabulary):
        return logits.sum(-1), gradient[row].float()

    sums = sums._replace(coefficient_N=torch.ones(N))
    losses = set_losses(hidden, weight, HeadLoss(given, torch.arange(N), sums))
    (ours,) = torch.autograd.grad(losses.sum() / 3, [weight])
    exact = gradient.double().T @ hidden.detach().double() / 3
    once = (exact.bfloat16() - exact).norm()
    # float32 sums round a few values the other way; rounding per chunk gives 1.4 to 2 times the error.
    assert ours.dtype == torch.bfloat16 and (ours - exact).norm() < 1.01 * once


class Graphs:
    """torch.compile backend that runs graphs uncompiled and keeps them as a compiler gets them."""

    def __init__(self):
        self.kept = []
        self.backend = aot_autograd(fw_compiler=self._keep, keep_inference_input_mutations=True)

    def _keep(self, module, example):
        self.kept.append(module.graph)
        return module


@pytest.mark.parametrize(
    "loss, dtype, temperature",
    [
        (cross_entropy, torch.bfloat16, 1.0),
        (kl, torch.float32, 2.0),  # arguments are not cast, so an in-place loss would overwrite both
        (reverse_kl, torch.bfloat16, 1.0),
    ],
)
def test_compiled_losses_are_the_eager_ones_in_one_graph(monkeypatch, loss, dtype, temperature):
    """One graph serves every row count, with and without gradients, without overwriting or copying arguments."""
    graphs = Graphs()
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", 128 * V * 4)
    for tokens in (300, 5, 1):
        generator = torch.Generator().manual_seed(tokens)
        hidden, teacher = (torch.randn(tokens, D, generator=generator).to(dtype) for _ in range(2))
        weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
        label = torch.randint(V, (tokens,), generator=generator)
        sums = SetSum(torch.rand(tokens, generator=generator), torch.zeros(tokens, dtype=torch.int64), 1)
        head = HeadLoss(loss, label if loss is cross_entropy else teacher, sums, temperature)
        eager, compiled = (
            set_losses(hidden.requires_grad_(), weight, head, backend=backend) for backend in (None, graphs.backend)
        )
        # Same operators, except probabilities as exponentials of log-probabilities: float32 rounding.
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)
        ours, theirs = (torch.autograd.grad(x.sum(), [hidden, weight]) for x in (compiled, eager))
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            set_losses(hidden, weight, head, backend=graphs.backend)
    (graph,) = graphs.kept
    # Targets without overloads are arithmetic on symbolic sizes, which depends on what was compiled before.
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    operators = {target.overloadpacket.__name__ for target in targets if hasattr(target, "overloadpacket")}
    assert not operators & {"copy_", "clone", "scatter", "scatter_add", "empty"} and "exp" in operators


def smoothed(smoothing, backend=None, dtype=torch.float64):
    """Return losses, their gradients, and what is reported of the tokens."""
    hidden, weight, _, label, sums = problem(1, dtype)
    head = HeadLoss(smoothed_cross_entropy(smoothing), label, sums)
    losses = set_losses(hidden, weight, head, backend=backend)
    return losses, *torch.autograd.grad(losses.sum(), [hidden, weight]), head.token_losses()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_smoothed_labels_equal_those_of_the_library_and_report_the_plain_loss(monkeypatch, compiled):
    graphs = Graphs() if compiled else None
    backend = graphs and graphs.backend
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", 10 * V * 8)
    hidden, weight, _, label, sums = problem(1)
    expected = sums(F.cross_entropy(hidden @ weight.T, label, reduction="none", label_smoothing=0.1))
    gradients = torch.autograd.grad(expected.sum(), [hidden, weight])
    ours, *our_gradients, reported = smoothed(0.1, backend)
    for x, y in zip([ours, *our_gradients], [expected, *gradients], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    if graphs:  # in the later steps of an objective, too
        smoothed(0.1, backend)
        assert len(graphs.kept) == 1
    plain = smoothed(0.0, backend)
    assert torch.equal(reported, plain[-1]) and not torch.equal(ours, plain[0])


def test_labels_that_are_not_smoothed_leave_the_loss_as_it_is():
    assert smoothed_cross_entropy(0.0) is cross_entropy
    assert smoothed_cross_entropy(0.1) is smoothed_cross_entropy(0.1)


def test_labels_are_smoothed_over_a_whole_sharded_vocabulary():
    """Two tensor-parallel ranks: 50 of 100 words each."""

    def body():
        rank, group = dist.get_rank(), dist.group.WORLD
        results = []
        for shards, own in ((1, 0), (2, rank)):
            hidden, weight, _, label, sums = problem(1)
            local = weight.detach()[:100].chunk(shards)[own].requires_grad_()
            head = HeadLoss(smoothed_cross_entropy(0.1), label.clamp(max=99), sums)
            losses = set_losses(hidden, local, head, group if shards > 1 else None)
            dh, dw = torch.autograd.grad(losses.sum(), [hidden, local])
            results.append((losses, dh, dw, head.token_losses()))
        (whole, dh, dw, nll), (losses, partial_dh, local_dw, local_nll) = results
        dist.all_reduce(partial_dh)
        pairs = ((losses, whole), (partial_dh, dh), (local_dw, dw.chunk(2)[rank]), (local_nll, nll))
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)

    assert ranks.fork_group(2, body) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_chunk_holds_what_the_estimate_says(monkeypatch, loss, dtype):
    """Peak bytes per chunk element over all tensors of a chunk's size that are alive at once."""

    class LiveBytes(TorchDispatchMode):
        now = peak = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            out = operator(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.shape == (N, V) and x.untyped_storage().data_ptr() not in old:
                    self.change(x.untyped_storage().nbytes())
                    weakref.finalize(x.untyped_storage(), self.change, -x.untyped_storage().nbytes())
            return out

        def change(self, size):
            self.now += size
            self.peak = max(self.peak, self.now)

    hidden, weight, teacher, label, sums = problem(1, dtype)
    temperature = 1.0 if loss is cross_entropy else 2.0
    head = HeadLoss(loss, label if loss is cross_entropy else teacher, sums, temperature)
    with LiveBytes() as live:
        set_losses(hidden, weight, head)
    assert live.peak == N * V * chunk_bytes(loss.__name__, dtype, fused=False)


def test_a_constant_head_costs_no_gradient_of_its_own():
    hidden, weight, _, label, sums = problem(1)
    constant = weight.detach()
    products = count_products(lambda: set_losses(hidden, constant, HeadLoss(cross_entropy, label, sums)))
    assert products == {"grad": 2, "no_grad": 1}
    products = count_products(lambda: set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums)))
    assert products == {"grad": 3, "no_grad": 1}


def count_products(run):
    """Count matrix products of a forward and backward pass, and of a forward pass under no_grad."""

    class Products(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.number += operator.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm_", "aten::addmm")
            return operator(*args, **(kwargs or {}))

    with Products() as grad:
        run().sum().backward()
    with torch.no_grad(), Products() as no_grad:
        run()
    return {"grad": grad.number, "no_grad": no_grad.number}


def test_padding_counts_for_nothing_even_where_it_is_not_finite():
    hidden, weight, _, label, sums = problem(3)
    expected = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    with torch.no_grad():
        hidden[5:9] = torch.nan
    losses = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    assert torch.equal(losses, expected)
    (gradient,) = torch.autograd.grad(losses.sum(), [hidden])
    assert gradient[:5].isfinite().all() and gradient[9:].isfinite().all()
