"""Mixture of experts: equal numbers on every layout, and fast weights per sample."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torchtitan.models.moe.moe import GroupedExperts

from memdlm_dist.compat import torch as compat
from memdlm_dist.method import inner_sgd
from memdlm_dist.method.bilevel import Memory, outer_loss
from memdlm_dist.method.fast_weight_tree import leaves, map_leaves, select
from memdlm_dist.method.fast_weights import LowRank
from memdlm_dist.method.inner_loss import inner_loss
from memdlm_dist.method.inner_sgd import FastWeightGroup, InnerSGD
from memdlm_dist.method.trajectory import Plan
from memdlm_dist.models import backbone_args, experts, flavours
from memdlm_dist.models.experts import AdaptableExperts
from memdlm_dist.models.llada2 import LLaDA2Args
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.lora import LoRA, add_adapters
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.training.metrics import LARGEST_LOAD, LOAD_ENTROPY, UNUSED
from memdlm_dist.training.objective import Objective
from tests.support import zygote
from tests.workers.balanced_experts import COEFFICIENT
from tests.workers.sharded_experts import COMPILED, LAYOUTS, USUAL, has_own_sets, options_of

COMPILED_OPTIONS = ["lora", "sample-non-finite"]  # shared sets, and one set per sample
# Layouts sum in different orders: float32 rounding of quantities of order 1, 4e-6 measured.
TOLERANCE = 1e-5
# One dense layer and two mixtures. The router's product follows the dtype of a model in float64.
ARGS = LLaDA2Args(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=16, vocab_size=61, max_seq_len=24, n_experts=8,
    experts_per_token=2, expert_groups=4, groups_per_token=2, float32_router=False, shared_hidden_dim=24,
    dense_hidden_dim=40,
)  # fmt: skip


def find(root, options_of_layout):
    for layout, options in options_of_layout.items():
        zygote.call(LAYOUTS[layout][0], "tests.workers.sharded_experts:find", str(root), layout, options)
    return {layout: torch.load(root / f"{layout}.pt") for layout in LAYOUTS}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return find(tmp_path_factory.mktemp("experts"), USUAL)


@pytest.fixture(scope="module")
def other_results(tmp_path_factory):
    single = {layout: options_of(layout) for layout in ("one", "one-twice")}
    return find(tmp_path_factory.mktemp("others"), single | OTHERS)


@pytest.fixture(scope="module")
def compiled_results(tmp_path_factory):
    root = tmp_path_factory.mktemp("compiled")
    names = {name: layout for layout in COMPILED for name in (layout, f"{layout}-compiled")}
    for name, layout in {"one": "one", **names}.items():  # "one" writes the weights
        zygote.call(LAYOUTS[layout][0], "tests.workers.sharded_experts:find", str(root), name, COMPILED_OPTIONS)
    return {name: torch.load(root / f"{name}.pt") for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED)
def test_a_layout_compiled_around_its_experts_takes_the_eager_steps(compiled_results, layout):
    """Same bits as eager; a step with other token counts per expert compiles nothing."""
    eager, compiled = compiled_results[layout], compiled_results[f"{layout}-compiled"]
    for options in COMPILED_OPTIONS:
        for name, value in eager[options].items():
            assert torch.equal(compiled[options][name], value), (options, name)
    assert compiled["gathers"] == eager["gathers"]
    # The dense layer's two graphs, with and without gradient. Two graphs before the experts and two after, for inner
    # steps and for the outer step.
    assert compiled["graphs"].tolist() == [12, 12] and eager["graphs"].tolist() == [0, 0]


SHARDED = [layout for layout in LAYOUTS if not layout.startswith("one")]
OTHERS = {layout: [name for name in options_of(layout) if name not in USUAL[layout]] for layout in SHARDED}


def steps_of(options_of_layout):
    return [(layout, options) for layout in SHARDED for options in options_of_layout[layout]]


@pytest.mark.parametrize("layout, options", steps_of(USUAL))
def test_a_layout_gives_the_single_process_loss_and_gradients(results, layout, options):
    check(results, layout, options)


@pytest.mark.slow
@pytest.mark.parametrize("layout, options", steps_of(OTHERS))
def test_a_layout_gives_the_single_process_step_with_other_options(other_results, layout, options):
    check(other_results, layout, options)


def check(results, layout, options):
    ours = results[layout][options]
    # Shared sets: one per micro-batch of a rank, or of an expert-parallel group.
    twice = LAYOUTS[layout][2] == 2 and not has_own_sets(options)
    single = results["one-twice" if twice else "one"][options]
    assert ours.keys() == single.keys()
    for name, theirs in single.items():
        if name == "skipped":
            assert torch.equal(ours[name], theirs)
        elif name != "load":
            assert (ours[name] - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name
    # Recomputed layers count their load twice.
    assert torch.equal(ours["load"] / ours["load"].sum(), single["load"] / single["load"].sum())
    assert single["skipped"].tolist() == [0.0] * (len(single["skipped"]) - 1) + [float("non-finite" in options)]
    assert single["written"].min() > 0.01 and all(x.abs().max() > 0 for k, x in single.items() if k != "skipped")


def test_a_rank_reads_its_part_of_the_weights(results):
    """DCP's reader reads only a rank's part of the Hugging Face folder, plus replicated routers, biases and norms.

    Queries, keys and values are rows of one tensor there.
    """
    total = results["one"]["read"]
    weights = (x for name, x in results["one"]["lora"].items() if "weight" in name or "experts" in name)
    assert total == sum(x.numel() for x in weights) + backbone_args("llada2", "tiny").n_experts
    for layout, (ranks, _, _) in LAYOUTS.items():
        assert results[layout]["read"] < total * (1 / ranks + 0.02), layout


def test_experts_are_gathered_no_more_often_than_in_plain_training(results):
    """Only the trunk (embedding and lower layer) is gathered again in the backward pass.

    FSDP groups are embedding, two layers and head; with expert parallelism, a layer's experts form another group. The
    lower layer is dense.
    """
    assert results["fsdp2"]["gathers"] == {"plain": 4 + 3, "ours": 4 + 2}
    assert results["fsdp2-ep2"]["gathers"] == {"plain": 5 + 4, "ours": 5 + 2}


@pytest.mark.slow
def test_the_experts_of_a_trunk_are_gathered_again(other_results):
    """Both layers have mixtures, in two groups each."""
    assert other_results["fsdp2-ep2"]["gathers of two mixtures"] == {"plain": 6 + 5, "ours": 6 + 3}


def test_ranks_with_sets_of_their_own_add_up_norms_alone(results):
    """Shared sets also add up losses, token counts, and gradients of the shared expert: A and B of three linears.

    Two inner steps, and the norm of the total change. Ranks with sets of their own exchange their keys instead of
    taking those of the first. The exchanges of tokens are the same.
    """
    shared, own = (
        [x for x in results["fsdp2-ep2"][f"{name} collectives"] if x[0] != "all_to_all"]
        for name in ("lora", "pairs-probability")
    )
    assert [kind for kind, _ in shared] == ["broadcast", *["all_reduce"] * (2 * (1 + 1 + 6 + 1) + 1)]
    assert own == [("all_gather", 2), *[("all_reduce", 2)] * (2 + 1)]
    shared, own = (
        [kind for kind, _ in results["ep2"][f"{name} collectives"]].count("all_to_all")
        for name in ("lora", "sample-non-finite")
    )
    # Counts, tokens and outputs; and in the backward pass outputs, and in that of the outer loss tokens.
    assert shared == own == 2 * (3 + 1) + 3 + 2


def test_an_expert_parallel_rank_sends_and_stores_what_is_foretold(results):
    """Compare the estimate with a real step: one set for the group, and sets of each rank."""
    for name in ("everywhere", "pairs-packed"):
        estimate = results["ep2"][f"{name} estimate"]
        predicted, sent = estimate["sent"]
        assert predicted == pytest.approx(sent, rel=0.01), name
        predicted, stored = estimate["fast weights"]
        assert predicted == stored, name


def test_a_set_that_is_not_updated_keeps_its_terms_on_every_rank(monkeypatch):
    """A set's own rank knows the reason and tells the others; here the first of two ranks, with a set each."""
    memory = memory_of()
    both, own = memory.draw(0, 1, IDS[:2]), memory.draw(0, 1, IDS[:1])
    experts = frozenset((x.layer, x.target) for x in memory.linears if x.experts)
    fast = {
        layer: {target: (both if (layer, target) in experts else own)[layer][target] for target in targets}
        for layer, targets in both.items()
    }
    group = FastWeightGroup(SimpleNamespace(size=lambda: 2), "experts", experts)
    grads = [torch.ones_like(x) for x in leaves(fast)]
    monkeypatch.setattr(inner_sgd, "get_rank", lambda _: 0)
    for ours, theirs, changed in (
        (True, torch.tensor([0.0, torch.nan]), [True, False]),
        (False, torch.tensor([0.0, 1.0]), [False, True]),
    ):
        monkeypatch.setattr(inner_sgd, "all_reduce", lambda x, group, theirs=theirs: x.add_(theirs))
        new, norm = inner_sgd.sgd_update(fast, grads, InnerSGD(), torch.tensor([ours]), group)
        assert norm.isfinite().tolist() == [ours]
        for before, after, is_local in zip(leaves(fast), leaves(new), group.is_local(fast), strict=True):
            differs = (before != after).unflatten(0, (-1, 2 if is_local else 1)).flatten(2).any(2)
            assert differs.tolist() == [changed if is_local else changed[:1]] * len(differs)


def test_the_sets_and_the_biases_matter(results):
    """Loss depends on both, so the comparisons above detect fast weights of the wrong set and missing biases."""
    one, twice = (results[layout]["lora"]["loss"] for layout in ("one", "one-twice"))
    assert abs(one - twice) > 1e-3 * one
    assert abs(one - results["one"]["loss without biases"]) > 1e-3 * one


@pytest.fixture(scope="module")
def balanced():
    return zygote.call(1, "tests.workers.balanced_experts:find", "one")


def test_the_bias_of_an_expert_follows_its_load(balanced):
    """It rises below the mean load and falls above; the changes are centred, which selects the same experts.

    Loads are counted from the routers' selections in the passes of the training loss. A skipped step changes no bias.
    """
    (first, second, third), (load, other), metrics = balanced
    mean = sum(load) / len(load)
    change = [COEFFICIENT * ((mean > x) - (mean < x)) for x in load]
    assert second == pytest.approx([b + x - sum(change) / len(change) for b, x in zip(first, change, strict=True)])
    assert third == second
    assert sum(load) == sum(other) == 2 * 2 * 16 * 2 and len(set(load)) > 4
    shares = [x / sum(load) for x in load if x]
    assert metrics == {
        LARGEST_LOAD: pytest.approx(max(load) / mean),
        UNUSED: load.count(0) / len(load),
        LOAD_ENTROPY: pytest.approx(-sum(x * math.log(x) for x in shares) / math.log(len(load))),
    }


@pytest.mark.parametrize(
    "layout", ["fsdp2-full", pytest.param("ep2", marks=pytest.mark.slow), pytest.param("tp2", marks=pytest.mark.slow)]
)
def test_biases_and_loads_are_equal_on_every_layout(balanced, layout):
    assert zygote.call(2, "tests.workers.balanced_experts:find", layout) == balanced


def test_a_checkpoint_holds_the_biases_and_no_coefficient_keeps_them(tmp_path):
    once, again = zygote.call(1, "tests.workers.balanced_experts:resume", str(tmp_path))
    assert once == again
    before, after = zygote.call(1, "tests.workers.balanced_experts:keep")
    assert before == after and any(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LLaDAMixture(ARGS)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention and router are not flat
        for mixture in model.mixtures():
            mixture.expert_bias.uniform_(-0.1, 0.1)
    return model.double()


OBJECTIVE = Objective(60, Plan(), None, seed=0, tp_size=1, tp_rank=0)
TOKENS = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([5, 9, 2])


def memory_of(fast_weight_type="lora", norm="per_parameter", first=1, args=ARGS):
    return Memory(
        first, args.adapted_linears(first, ["ffn"]), fast_weight_type, 8, 16.0,
        inner_loss("cross_entropy", "pre_final_norm", "post_final_norm"), InnerSGD(0.3, 1.0, norm), samples_per_set=1,
    )  # fmt: skip


def step(model, memory, rows):
    """Return loss, inner statistics, gradients and fast weights of a float64 step on the given rows."""
    batch = replace(OBJECTIVE, memory=memory).micro_batch(TOKENS[rows], TOKENS[rows], IDS[rows], 1)
    fast = map_leaves(lambda x: x.double(), memory.draw(0, 1, IDS[rows]))
    adapted = []
    model.zero_grad()
    loss, inner = outer_loss(model, batch, memory, fast, on_adapted=adapted.append)
    loss.backward()
    return loss.detach(), inner, [p.grad.clone() for p in model.parameters()], adapted[0]


@pytest.mark.parametrize("fast_weight_type, norm", [("lora", "per_parameter"), ("full", "global")])
@pytest.mark.parametrize("padded", [False, True], ids=["loop", "padded"])
def test_a_sequence_has_its_own_fast_weights_in_every_expert(model, monkeypatch, fast_weight_type, norm, padded):
    """Three rows together equal each row alone, with and without groups padded for grouped products.

    Routed and shared experts adapt, and with full matrices the dense layer too.
    """
    if padded:
        # The loop on padded groups stands in for a grouped product.
        monkeypatch.setattr(experts, "_grouped", lambda counts: padded_loop(counts))
        for mixture in model.mixtures():
            monkeypatch.setattr(mixture.experts, "use_grouped_mm", True)
    memory = memory_of(fast_weight_type, norm, first=0 if fast_weight_type == "full" else 1)
    loss, inner, gradients, fast = step(model, memory, [0, 1, 2])
    alone = [step(model, memory, [row]) for row in range(3)]
    torch.testing.assert_close(loss, sum(x[0] for x in alone))
    torch.testing.assert_close(inner.loss_KG, torch.cat([x[1].loss_KG for x in alone], 1))
    torch.testing.assert_close(inner.grad_norm_KG, torch.cat([x[1].grad_norm_KG for x in alone], 1))
    assert inner.written_norm_G.min() > 0.1
    for together, *each in zip(gradients, *(x[2] for x in alone), strict=True):
        # float64, except for the router's scores, the weighted sums and the norms of clipping.
        assert (together - sum(each)).abs().max() <= 1e-6 * together.abs().max()
    for row in range(3):
        for ours, theirs in zip(leaves(select(fast, [row], 3)), leaves(alone[row][3]), strict=True):
            torch.testing.assert_close(ours, theirs)


def padded_loop(counts):
    assert (counts % 8 == 0).all() and (counts > 0).all()
    return experts._loop(counts)


def test_the_grouped_product_computes_what_the_loop_does():
    """Grouped products run in bfloat16; groups are (expert, row) pairs, some of them empty."""
    torch.manual_seed(1)
    experts = AdaptableExperts(32, 16, 4, use_grouped_mm=False)
    with torch.no_grad():
        experts.init_weights(0.2)
    experts.add_adapters(["w1", "w2"], rank=8, scale=2.0, dtype=torch.float32)
    for name, parameter in experts.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    counts_EG = torch.tensor([[3, 9], [0, 8], [1, 0], [17, 2]])
    x = torch.randn(40, 32, requires_grad=True)
    # Two sets for each of four experts.
    fast = {
        linear.target: LowRank.start(linear, 8, 16.0, torch.arange(8), None)
        for linear in LLaDAMoEArgs(dim=32, n_layers=1, hidden_dim=16, n_experts=4, experts_per_token=2).adapted_linears(
            0, ["ffn"]
        )
    }
    fast = {target: x._replace(B_GoR=torch.randn_like(x.B_GoR) * 0.3) for target, x in fast.items()}
    results = []
    for grouped in (False, True):
        experts.use_grouped_mm = grouped
        y = experts(x, counts_EG.flatten(), fast=fast)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *experts.parameters()])))
    for loop, grouped in zip(*results, strict=True):
        assert (loop - grouped).norm() < 0.02 * loop.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_groups_than_a_grouped_product_takes_are_multiplied_in_parts(monkeypatch, dtype):
    """Splitting keeps each group's bits and the loop's numbers.

    Some groups are empty, and rows after the last group do not affect the result.
    """
    torch.manual_seed(1)
    counts = torch.tensor([0, 3, 0, 8, 5, 0, 0, 7, 1, 9, 2, 0])
    last, ends = int(counts.sum()), counts.cumsum(0, dtype=torch.int32)
    x, weight = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in [(last + 6, 16), (len(counts), 8, 16)]
    )
    gradient = torch.randn(last + 6, 8, dtype=dtype)
    with torch.no_grad():
        x[last:] = gradient[last:] = torch.nan

    def run(product, limit):
        monkeypatch.setattr(compat, "MAX_GROUPS", limit)
        y = product(x, weight)
        dx, dw = torch.autograd.grad(y, [x, weight], gradient[: len(y)])
        return y[:last], dx[:last], dw

    unsplit, *splits = (run(lambda x, weight: compat.grouped_mm(x, weight, ends), limit) for limit in (1023, 7, 4, 3))
    loop = run(lambda x, weight: experts._loop(counts)(x[:last], weight), 1023)
    # The loop sums in another order: rounding to 24 bits in float32, to 8 in bfloat16.
    close = {"rtol": 0, "atol": {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]}
    for i, value in enumerate(unsplit):
        assert all(torch.equal(other[i], value) for other in splits)
        torch.testing.assert_close(value, loop[i], **close)


def test_a_step_with_its_groups_in_parts(model, monkeypatch):
    """24 groups, of eight experts and three sets, give the same bits when products are split."""
    for mixture in model.mixtures():
        monkeypatch.setattr(mixture.experts, "use_grouped_mm", True)
    sizes, plain = [], torch._grouped_mm

    def counted(x, weight, offs):
        sizes.append(len(offs))
        return plain(x, weight, offs=offs)

    def run(limit):
        monkeypatch.setattr(compat, "MAX_GROUPS", limit)
        sizes.clear()
        loss, inner, gradients, fast = step(model, memory_of(), [0, 1, 2])
        statistics = [x for x in inner.__dict__.values() if isinstance(x, torch.Tensor)]
        return [loss, *statistics, *gradients, *leaves(fast)]

    monkeypatch.setattr(torch, "_grouped_mm", counted)
    unsplit = run(1023)
    assert max(sizes) == 24
    split = run(5)
    assert max(sizes) == 5
    assert all(torch.equal(x, y) for x, y in zip(split, unsplit, strict=True))


def test_blocks_compiled_around_their_experts_are_the_eager_ones():
    """Same bits with outer adapters on packed rows with fast weights per document.

    Another routing, with other token counts per expert, compiles nothing.
    """
    models, graphs, args = [], [], replace(ARGS, n_layers=1, n_dense_layers=0)
    for _ in range(2):
        model = LLaDAMixture(args)
        add_adapters(model, LoRA(rank=4), torch.float32, torch.float32)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        models.append(model)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    for block in models[1].layers.values():
        block.compile_parts(backend)
    memory = memory_of(first=0, args=args)
    documents = (torch.arange(24) * 3 // 24).expand(3, -1)
    compiled, loads = [], []
    for number in range(2):
        tokens = torch.randint(0, 60, (3, 24), generator=torch.Generator().manual_seed(number))
        batch = replace(OBJECTIVE, memory=memory).micro_batch(tokens, tokens, IDS, 1, documents_BL=documents)
        results = []
        for model in models:
            model.zero_grad()
            loss, inner = outer_loss(model, batch, memory, memory.draw(0, 1, batch.sample_ids_U))
            loss.backward()
            trained = [p.grad for p in model.parameters() if p.requires_grad]
            results.append([loss.detach(), inner.loss_KG, inner.written_norm_G, *trained, model.take_load()])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        written_BS = inner.written_norm_G.view(3, 4)
        assert written_BS[:, :3].min() > 0 and not written_BS[:, 3].any(), "a row's last slot is empty"
        compiled.append(len(graphs))
        loads.append(results[0][-1])
    # Two graphs before the experts and two after, for inner steps and for the outer step.
    assert compiled == [8, 8] and not torch.equal(*loads)


def test_experts_without_fast_weights_are_torchtitans(model):
    """Our loop over groups equals torchtitan's loop."""
    experts = model.mixtures()[0].experts
    x = torch.randn(12, 32, dtype=torch.float64)
    counts = torch.tensor([3, 0, 5, 4, 0, 0, 0, 0])
    torch.testing.assert_close(experts(x, counts, fast={}), GroupedExperts.forward(experts, x, counts))


def test_sizes_of_the_published_model():
    args = flavours.LLADA_MOE["7B-A1B"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaDAMixture(replace(args, max_seq_len=16)).parameters())
    # 7B parameters, 1B active per token: embedding, head, attention, router and 8 of 64 experts.
    assert parameters == 7_356_880_896
    linears = args.adapted_linears(14, ["ffn"])
    assert [x.target for x in linears] == ["gate", "up", "down"] * 2 and {x.layer for x in linears} == {"14", "15"}
    assert len(numbers_of(args)) == 16 * (3 * 64 + 4)


def numbers_of(args):
    """Return the numbers of all fast weights' keys, of which no two are equal."""
    linears = args.adapted_linears(0, ["ffn", "attention"])
    numbers = [linear.number + e for linear in linears for e in range(linear.experts or 1)]
    assert len(set(numbers)) == len(numbers)
    return numbers


def test_sizes_of_llada2_mini():
    args = flavours.LLADA2["mini"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LLaDAMixture(replace(args, max_seq_len=16)).parameters())
    # 16B parameters, 1.4B active per token: all but 248 of 256 experts.
    assert parameters == 16_255_638_528
    assert parameters - 19 * 248 * 3 * 2048 * 512 == pytest.approx(1.44e9, rel=0.01)
    # The last two layers: 256 routed experts and a shared one, each with three linears.
    linears = args.adapted_linears(18, ["ffn"])
    targets = ["gate", "shared_gate", "up", "shared_up", "down", "shared_down"]
    assert [x.target for x in linears] == targets * 2
    per_set = sum((x.experts or 1) * 32 * (x.in_features + x.out_features) for x in linears)
    assert per_set == 2 * 257 * 3 * 32 * (2048 + 512)
    assert len(numbers_of(args)) == 19 * 3 * 257 + 3 + 20 * 4
