"""Accelerator results against the CPU's: random draws, published fixtures, losses of the head."""

import math

import pytest
import torch

from memdlm_dist.golden.checks import check
from memdlm_dist.method import fast_weight_tree, fast_weights, keyed_random
from memdlm_dist.method.diffusion import SetSum
from memdlm_dist.method.keyed_random import Stream
from memdlm_dist.method.logit_loss import HeadLoss, cross_entropy, kl, reverse_kl, set_losses
from memdlm_dist.models.initial_weights import Normal, Uniform, distribution
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.performance.straightforward import DISTANCES
from tests.support.zygote import ROOT

# Sample ids spaced like the ids of packed documents.
IDS = torch.arange(5) * 2**40 + 17
# No width is a power of 4, so that dividing by its square root rounds.
SIZES = {"dim": 96, "n_layers": 2, "n_heads": 6, "vocab_size": 1000, "max_seq_len": 16}
BACKBONES = {
    "dense": (LLaDA, LLaDAArgs(**SIZES, hidden_dim=160)),
    "experts": (LLaDAMixture, LLaDAMoEArgs(**SIZES, hidden_dim=40, n_experts=4, experts_per_token=2)),
    "shared expert": (
        LLaDAMixture,
        LLaDA2Args(
            **SIZES, n_kv_heads=2, hidden_dim=40, n_experts=8, experts_per_token=2, expert_groups=4, groups_per_token=2,
            shared_hidden_dim=56, dense_hidden_dim=160,
        ),
    ),
}  # fmt: skip


def test_random_numbers_have_the_cpus_bits(device):
    def numbers(target):
        keys = keyed_random.key(2**31 + 7, Stream.MASK, 12, IDS.to(target))
        index = torch.arange(1000, device=target)
        symmetric = keyed_random.symmetric(keys, index)
        return (
            keys, keyed_random.uniform(keys, index), keyed_random.uniform(keys, index, torch.float32),
            symmetric.clone(), Uniform(160**-0.5).transform(symmetric),
        )  # fmt: skip

    for ours, theirs in zip(numbers(device), numbers("cpu"), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fast_weights_start_with_the_cpus_bits(device, backbone):
    _, args = BACKBONES[backbone]
    linears = args.adapted_linears(1, ["ffn", "attention"])

    def draw(target):
        keys = fast_weights.keys(7, 3, IDS.to(target))
        return fast_weight_tree.leaves(fast_weights.draw("lora", linears, 8, 16.0, keys, None))

    for ours, theirs in zip(draw(device), draw("cpu"), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_start_as_on_the_cpu(device, backbone):
    """Initial weights agree to rounding: uniform numbers have the same bits, but erfinv differs per device.

    The test maps weights back to uniform numbers. float32 has a spacing of 6e-8 below 1, and erfinv may be off by a few
    units.
    """
    model_cls, args = BACKBONES[backbone]

    def weights(target):
        torch.manual_seed(7)
        with torch.device(target):
            model = model_cls(args)
        with torch.no_grad():
            model.init_weights()
        return {name: x.detach() for name, x in model.named_parameters()}

    ours, theirs = weights(device), weights("cpu")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        chosen = distribution(name, x.shape, args)
        if not isinstance(chosen, Normal):
            assert torch.equal(x.cpu(), theirs[name]), name
            continue
        u, v = (torch.erf(y.cpu().double() / (math.sqrt(2) * chosen.std)) for y in (x, theirs[name]))
        torch.testing.assert_close(u, v, rtol=0, atol=5e-7, msg=name)


FIXTURES = sorted(path.parent.name for path in ROOT.glob("tests/golden/*/manifest.json"))


@pytest.mark.parametrize("fixture", [name for name in FIXTURES if not name.startswith("sampler")])
def test_the_published_numbers(device, fixture):
    """Fixtures pass with the CPU's tolerances; the sampler's fixture holds token ids and runs only on a CPU."""
    lines = list(check(ROOT / "tests/golden" / fixture, device.type))
    assert lines and all(line.ok for line in lines), "\n".join(map(str, lines))


VOCABULARY, TOKENS, WIDTH = 126_464, 600, 64  # two chunks of logits


@pytest.mark.parametrize("backend", [None, "inductor"], ids=["eager", "compiled"])
@pytest.mark.parametrize("loss", [cross_entropy, kl, reverse_kl])
# Relative to gradient norms and summed losses. float32: rounding of sums over the vocabulary; bfloat16 carries 8 bits.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["float32", "bf16"])
def test_losses_at_a_real_vocabulary_are_those_of_whole_logits(request, device, loss, dtype, tolerance, backend):
    if backend is not None:
        request.getfixturevalue("compiler")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    hidden, teacher = normal(TOKENS, WIDTH).requires_grad_(), normal(TOKENS, WIDTH)
    weight = (normal(VOCABULARY, WIDTH) * WIDTH**-0.5).requires_grad_()
    label = torch.randint(VOCABULARY, (TOKENS,), generator=generator).to(device)
    coefficient = torch.rand(TOKENS, generator=generator)
    coefficient[5:9] = 0  # padding
    sums = SetSum(coefficient.to(device), torch.zeros_like(label), 1)

    head = HeadLoss(loss, label if loss is cross_entropy else teacher, sums)
    losses = set_losses(hidden, weight, head, backend=backend)
    gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    target = label if loss is cross_entropy else teacher.double() @ exact[1].detach().T
    expected = sums._replace(coefficient_N=sums.coefficient_N.double())(DISTANCES[loss](exact[0] @ exact[1].T, target))
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_the_heads_gradient_is_rounded_once_over_all_chunks(device):
    """Products keep float32 sums; the reference is float64, with logit gradients given in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    tokens = 4 * TOKENS
    hidden, weight, gradient = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((tokens, WIDTH), (VOCABULARY, WIDTH), (tokens, VOCABULARY))
    )

    def given(logits, row, vocabulary):
        return logits.sum(-1), gradient[row].float()

    rows = torch.arange(tokens, device=device)
    sums = SetSum(torch.ones(tokens, device=device), torch.zeros_like(rows), 1)
    losses = set_losses(hidden, weight.requires_grad_(), HeadLoss(given, rows, sums))
    (ours,) = torch.autograd.grad(losses.sum() / 3, [weight])
    exact = gradient.double().T @ hidden.double() / 3
    # float32 sums of 2,400 products round a few values the other way.
    assert (ours - exact).norm() < 1.05 * (exact.bfloat16() - exact).norm()
