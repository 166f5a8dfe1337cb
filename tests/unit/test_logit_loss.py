"""The head's chunked losses against torch's own functions on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memdlm_dist.method import logit_loss
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy, kl, reverse_kl, set_losses
from memdlm_dist.performance.straightforward import DISTANCES

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
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, label, SetSum(coefficient, sets, n_sets)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [1, 10, N, 1000])
@pytest.mark.parametrize("n_sets", [1, 3])
def test_losses_and_gradients_equal_those_of_whole_logits(monkeypatch, loss, rows, n_sets):
    monkeypatch.setattr(logit_loss, "CHUNK_BYTES", rows * V * 8)
    hidden, weight, teacher, label, sums = problem(n_sets)
    target = label if loss is cross_entropy else teacher
    # A weight of its own on each set's loss, as an outer product of gradients would have.
    factor = torch.arange(1.0, n_sets + 1, dtype=torch.float64)
    inputs = [hidden, weight] if n_sets == 1 else [hidden]

    whole_target = label if loss is cross_entropy else teacher @ weight.detach().T
    expected = sums(DISTANCES[loss](hidden @ weight.T, whole_target))
    expected_gradients = torch.autograd.grad((factor * expected).sum(), inputs)
    found = set_losses(hidden, weight, HeadLoss(loss, target, sums, train_head=n_sets == 1))
    gradients = torch.autograd.grad((factor * found).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_cross_entropy_equals_the_librarys_own_chunked_function():
    hidden, weight, _, label, sums = problem(1, torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=10, chunking_method=None)
    theirs = sums(F.linear_cross_entropy(hidden, weight, label, reduction="none", options=options))
    ours = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    # float32 rounding of sums of 37 terms.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), [hidden, weight]) for x in (ours, theirs)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bfloat16_loses_no_more_than_its_products_do():
    hidden, weight, _, label, sums = problem(1, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    sums = sums._replace(coefficient_N=sums.coefficient_N.float())
    expected = sums(F.cross_entropy(exact[0] @ exact[1].T, label, reduction="none"))
    found = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.0)  # bfloat16 carries 8 bits
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), [hidden, weight]), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert F.cosine_similarity(ours.float().flatten(), theirs.flatten(), 0) > 0.999


class Largest(TorchDispatchMode):
    """The most elements that any operator has returned."""

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
    with Largest() as largest:
        set_losses(hidden, weight, head).backward()
    # Chunks of 10 rows (student and teacher stacked where a reduction takes both), and the weight's gradient.
    assert largest.elements <= max(2 * 10 * V, V * D) < N * V
    with Largest() as largest:
        (hidden @ weight.T).sum()
    assert largest.elements == N * V, "the detector works"


def test_chunks_are_as_large_as_said_at_a_real_vocabulary():
    vocabulary, tokens = 126_464, 700
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    sums = SetSum(torch.ones(tokens), torch.zeros(tokens, dtype=torch.int64), 1)
    with Largest() as largest:
        set_losses(hidden, weight, HeadLoss(cross_entropy, torch.arange(tokens), sums)).backward()
    assert tokens * vocabulary > largest.elements == tokens // 2 * vocabulary, "two chunks"
    assert largest.elements * 4 <= logit_loss.CHUNK_BYTES


def test_a_constant_head_costs_no_gradient_of_its_own():
    hidden, weight, _, label, sums = problem(1)
    products = count_products(lambda: set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums, False)))
    assert products == {"grad": 2, "no_grad": 1}
    products = count_products(lambda: set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums)))
    assert products == {"grad": 3, "no_grad": 1}


def count_products(run):
    """Matrix products of a forward and a backward pass, and of a forward pass under no_grad."""

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
    expected = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums, train_head=False))
    with torch.no_grad():
        hidden[5:9] = torch.nan
    found = set_losses(hidden, weight, HeadLoss(cross_entropy, label, sums, train_head=False))
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), [hidden])
    assert gradient[:5].isfinite().all() and gradient[9:].isfinite().all()
