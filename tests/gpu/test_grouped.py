"""Grouped matrix products against the loop over experts and the masked form of packed fast weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from memdlm_dist.compat.torch import grouped_mm
from memdlm_dist.method import fast_weight_tree, fast_weights
from memdlm_dist.method.bilevel import Memory, outer_loss
from memdlm_dist.method.documents import PADDING, Documents
from memdlm_dist.method.fast_weight_tree import map_leaves
from memdlm_dist.method.fast_weights import AdaptedLinear
from memdlm_dist.method.inner_loss import inner_loss
from memdlm_dist.method.inner_sgd import InnerSGD
from memdlm_dist.method.trajectory import Plan
from memdlm_dist.models.experts import AdaptableExperts
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.runtime.device import has_grouped_mm
from memdlm_dist.training.objective import Objective

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size": 128, "max_seq_len": 32}
ARGS = LLaDAMoEArgs(**SIZES, n_experts=4, experts_per_token=2)
BACKBONES = {
    "llada_moe": ARGS,
    "llada2": LLaDA2Args(
        **SIZES, n_kv_heads=2, n_experts=8, experts_per_token=2, expert_groups=4, groups_per_token=2,
        shared_hidden_dim=32, dense_hidden_dim=96,
    ),
}  # fmt: skip
# Relative to norms: grouped products run in bfloat16, which carries 8 bits, the loop in float32.
TOLERANCE = 0.02


@pytest.fixture(autouse=True)
def needs_grouped_products(device, request):
    if not has_grouped_mm():
        pytest.skip("this accelerator has no grouped products (compute capability 9 or 10)")
    request.getfixturevalue("compiler")


@pytest.mark.parametrize("sets", [0, 1, 2], ids=["no fast weights", "one set", "two sets"])
@pytest.mark.parametrize(
    "counts",
    [[[3, 9], [0, 8], [1, 0], [17, 2]], [[0, 0], [40, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0], [1, 39]]],
    ids=["one empty", "all to the second", "all to the last"],
)
def test_grouped_products_are_the_loop_with_empty_experts(device, sets, counts):
    """Same output and gradients; experts without tokens get zero gradients, not uninitialised memory."""
    torch.manual_seed(1)
    experts = AdaptableExperts(ARGS.dim, ARGS.hidden_dim, ARGS.n_experts, use_grouped_mm=False).to(device)
    with torch.no_grad():
        experts.init_weights(0.2)
    counts_EG = torch.tensor(counts, device=device)
    x = torch.randn(int(counts_EG.sum()), ARGS.dim, device=device, requires_grad=True)
    linears = replace(ARGS, n_layers=1).adapted_linears(0, ["ffn"])
    tree = fast_weights.draw("lora", linears, 8, 16.0, torch.arange(max(sets, 1), device=device), None)
    tree = map_leaves(lambda leaf: (leaf + 0.1 * torch.randn_like(leaf)).requires_grad_(), tree)
    fast, leaves = (tree["0"], fast_weight_tree.leaves(tree)) if sets else (None, [])

    results = []
    for grouped in (False, True):
        experts.use_grouped_mm = grouped
        y = experts(x, counts_EG.flatten() if sets == 2 else counts_EG.sum(1), fast=fast)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters(), *leaves])])
    for loop, product in zip(*results, strict=True):
        assert (loop - product).norm() <= TOLERANCE * loop.norm()
    chosen = counts_EG.sum(1) > 0
    for gradient in results[1][2:5]:  # the experts' three linears
        assert (gradient.abs().sum((1, 2)) > 0).tolist() == chosen.tolist()


def test_more_groups_than_a_grouped_product_takes(device):
    """1,200 groups with unused rows after the last equal the groups' separate products."""
    torch.manual_seed(1)
    sizes = [8 * (1 + i % 3) for i in range(1200)]
    ends = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)
    x, weight, gradient = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for shape in [(sum(sizes) + 16, 64), (1200, 32, 64), (sum(sizes) + 16, 32)]
    )
    gradient[sum(sizes) :] = torch.nan
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_mm(x, weight, ends)
    results = y, *torch.autograd.grad(y, [x, weight], gradient)
    separate = torch.cat([F.linear(x_g, w_g) for x_g, w_g in zip(x.split([*sizes, 16]), weight.unbind(), strict=False)])
    expected = separate, *torch.autograd.grad(separate, [x, weight], gradient[: sum(sizes)])
    for ours, theirs in zip(results, expected, strict=True):
        ours, theirs = (z[: sum(sizes)].float() for z in (ours, theirs))
        assert ours.isfinite().all() and (ours - theirs).norm() <= TOLERANCE * theirs.norm()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_with_grouped_products_is_the_step_with_the_loop(device, backbone):
    """Same loss, inner losses and gradients with fast weights per row; all but routed experts stay float32."""
    args = BACKBONES[backbone]
    memory = Memory(
        1, args.adapted_linears(1, ["ffn"]), "lora", 8, 16.0,
        inner_loss("cross_entropy", "pre_final_norm", "post_final_norm"), InnerSGD(0.1, 1.0), samples_per_set=1,
    )  # fmt: skip
    tokens = torch.randint(0, 127, (3, 32), generator=torch.Generator().manual_seed(2))
    batch = Objective(127, Plan(), memory, seed=0, tp_size=1, tp_rank=0).micro_batch(
        tokens, tokens, torch.tensor([5, 9, 2]), step=1
    )
    batch = batch.to(device)

    def step(grouped):
        torch.manual_seed(0)
        model = LLaDAMixture(replace(args, grouped=grouped)).to(device)
        with torch.no_grad():
            model.init_weights()
        loss, statistics = outer_loss(model, batch, memory, memory.draw(0, 1, batch.sample_ids_U))
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return grads | {"loss": loss.detach(), "inner losses": statistics.loss_KG, "written": statistics.written_norm_G}

    loop, grouped = step(False), step(True)
    gradients = [name for name in loop if name.endswith("weight") or ".w" in name]
    ours, theirs = (torch.cat([results[name].flatten() for name in gradients]) for results in (grouped, loop))
    assert F.cosine_similarity(ours, theirs, 0) > 0.999
    for name in ("loss", "inner losses", "written"):
        assert (grouped[name] - loop[name]).norm() <= TOLERANCE * loop[name].norm(), name


@pytest.mark.parametrize("fast_weight_type", fast_weights.FAST_WEIGHT_TYPES)
def test_grouped_terms_of_documents_are_the_masked_ones(device, fast_weight_type):
    """Same output and gradients with empty slots, padding and one-token documents; masked form in float32."""
    sizes = ((1, 47, 150, 40), (60, 100, 96))
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in sizes]
    number = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    documents = Documents(number.to(device), number.to(device), 8)
    linear = AdaptedLinear("0", "up", 64, 96, False, 0)
    start = fast_weights.FAST_WEIGHT_TYPES[fast_weight_type].start(
        linear, 8, 16.0, torch.arange(16, device=device), None
    )
    x = torch.randn(*number.shape, 64, device=device)
    upstream = torch.randn(*number.shape, 96, device=device)
    values = [torch.randn_like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in start]

    results = []
    for dtype in (torch.float32, torch.bfloat16):
        fast = type(start)(*(v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in values))
        inputs = [x.to(dtype).requires_grad_(), *(v for v in fast if isinstance(v, torch.Tensor))]
        y = fast.term(inputs[0], documents.assign_sets(grouped=dtype == torch.bfloat16))
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y, inputs, upstream.to(dtype))])
    for masked, grouped in zip(*results, strict=True):
        assert (masked - grouped).norm() <= TOLERANCE * masked.norm()
    # Slots without a document get zero gradients; a row's last slot holds the padding.
    for gradient in results[1][2:]:
        assert not gradient.unflatten(0, (2, 8))[0, 4:7].any() and not gradient.unflatten(0, (2, 8))[1, 3:7].any()
