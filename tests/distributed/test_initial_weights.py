"""Initial weights: bit-identical on every layout, with torchtitan's distributions; so are loaded adapters."""

import math

import pytest
import torch
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.moe import MoE

from memdlm_dist.models import BACKBONES as SPECS
from memdlm_dist.models import initial_weights
from memdlm_dist.models.initial_weights import Normal, Uniform
from memdlm_dist.models.llada import LLaDA, LLaDAArgs
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from tests.support import zygote
from tests.workers.sharded_weights import BACKBONES, LAYOUTS


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def single(adapters):
    worker = "tests.workers.sharded_weights:digests"
    return {name: zygote.call(1, worker, name, [], 7, str(adapters / name)) for name in BACKBONES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_with_the_single_process_weights(single, adapters, layout):
    """Drawn weights, and then an adapter that is read from a PEFT folder."""
    processes, backbone, arguments = LAYOUTS[layout]
    found = zygote.call(
        processes, "tests.workers.sharded_weights:digests", backbone, arguments, 7, str(adapters / backbone)
    )
    assert found == single[backbone]
    assert any(name.startswith("loaded") for name in found)
    assert all(found[name.removeprefix("loaded ")] != x for name, x in found.items() if name.startswith("loaded"))


def test_parameters_and_seeds_have_numbers_of_their_own(single):
    other = zygote.call(1, "tests.workers.sharded_weights:digests", "llada", [], 8)
    drawn = {name for name in other if "norm" not in name and "lora_B" not in name}
    assert len(drawn) == 2 + 2 * 2 * 7  # embedding, head; seven linears and their lora_A in each of two layers
    assert len({digests[name] for digests in (other, single["llada"]) for name in drawn}) == 2 * len(drawn)


ARGS = LLaDAArgs(dim=256, n_layers=2, n_heads=4, hidden_dim=512, vocab_size=512, max_seq_len=8)
MOE_ARGS = LLaDAMoEArgs(
    dim=256, n_layers=1, n_heads=4, hidden_dim=128, vocab_size=512, n_experts=4, experts_per_token=1, max_seq_len=8
)


def drawn(model_class, args, seed=0):
    torch.manual_seed(seed)
    model = model_class(args)
    model.init_weights()
    return {name: x.detach() for name, x in model.named_parameters()}


def kolmogorov_smirnov(a, b):
    """Return the largest difference between the empirical distribution functions of two samples."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    points = torch.cat([a, b])
    return max(
        (torch.searchsorted(a, points, right=right) / len(a) - torch.searchsorted(b, points, right=right) / len(b))
        .abs().max().item()
        for right in (False, True)
    )  # fmt: skip


def assert_same_distribution(ours, theirs, name):
    # For two samples of size n, the statistic exceeds 2.2 sqrt(2 / n) once in 8,000 times.
    assert kolmogorov_smirnov(ours, theirs) < 2.2 * math.sqrt(2 / ours.numel()), name
    # The relative standard error of a standard deviation is 1 / sqrt(2 n).
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=5 / math.sqrt(ours.numel())), name


def test_distributions_are_llama3s():
    sizes = {"dim": 256, "n_layers": 2, "n_heads": 4, "vocab_size": 512, "max_seq_len": 8, "multiple_of": 256}
    torch.manual_seed(1)
    theirs = Transformer(TransformerModelArgs(**sizes))
    with torch.no_grad():
        theirs.init_weights()
    theirs = dict(theirs.named_parameters())
    ours = drawn(LLaDA, ARGS)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if x.ndim > 1:
            assert_same_distribution(x, theirs[name].detach(), name)
        else:
            assert (x == 1).all() and (theirs[name] == 1).all(), name
    cut = 3 * 256**-0.5
    assert 0.98 * cut < ours["output.weight"].abs().max() <= cut


def test_distributions_are_those_of_torchtitans_experts():
    torch.manual_seed(1)
    theirs = MoE(MOE_ARGS.moe_args, MOE_ARGS.dim, MOE_ARGS.hidden_dim)
    with torch.no_grad():
        theirs.init_weights(0.02 / math.sqrt(2), torch.device("cpu"))
    ours = drawn(LLaDAMixture, MOE_ARGS)
    for name, x in theirs.named_parameters():
        assert_same_distribution(ours[f"layers.0.moe.{name}"], x.detach(), name)


def test_settings_of_a_flavour_scale_the_blocks_and_copy_the_embedding():
    plain = drawn(LLaDA, ARGS)
    changed = drawn(LLaDA, LLaDAArgs(**{**vars(ARGS), "init_std": 0.08, "head_from_embedding": True}))
    for name, x in plain.items():
        if name.startswith("layers") and x.ndim > 1:
            torch.testing.assert_close(changed[name], 4 * x)
    torch.testing.assert_close(changed["output.weight"], plain["tok_embeddings.weight"] / 16)


def correlation(a, b):
    return abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item())


def test_parameters_seeds_rows_and_columns_are_independent():
    ours, next_seed = drawn(LLaDA, ARGS), drawn(LLaDA, ARGS, seed=1)
    first, second = (ours[f"layers.{layer}.feed_forward.w1.weight"] for layer in (0, 1))
    # 131,072 numbers: the standard error is 0.0028.
    assert correlation(first, second) < 0.014
    assert correlation(first, ours["layers.0.feed_forward.w3.weight"]) < 0.014
    assert correlation(first, next_seed["layers.0.feed_forward.w1.weight"]) < 0.014
    assert correlation(first[1:], first[:-1]) < 0.014
    assert correlation(first[:, 1:], first[:, :-1]) < 0.014
    assert correlation(first[:, ::2].abs(), first[:, 1::2].abs()) < 0.02  # the halves of one 64-bit number


@pytest.mark.parametrize("chosen", [Normal(0.02), Normal(1.0, cut=3.0), Uniform(0.1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_block_is_the_block_of_the_whole(monkeypatch, chosen, threads):
    """Blocks do not depend on their alignment to CPU vectors or to the chunks of a draw."""
    torch.set_num_threads(threads)
    full = torch.empty(3, 101, 257)
    initial_weights._fill(full, "some.name", chosen)
    monkeypatch.setitem(initial_weights._CHUNK_ELEMENTS, "cpu", 1000)
    for first, sizes in (((0, 0, 0), (3, 101, 257)), ((1, 40, 33), (2, 3, 7)), ((0, 99, 128), (3, 2, 1))):
        block = torch.empty(sizes)
        monkeypatch.setattr(initial_weights, "local_block", lambda x, first=first, block=block: (block, first))
        initial_weights._fill(full, "some.name", chosen)
        (a, b, c), (i, j, k) = first, sizes
        assert torch.equal(block, full[a : a + i, b : b + j, c : c + k])


def test_every_parameter_of_every_flavour_has_a_distribution():
    for args, model_class in ((args, spec.model) for spec in SPECS.values() for args in spec.flavours.values()):
        with torch.device("meta"):
            model = model_class(args)
        for name, x in model.state_dict().items():
            initial_weights.distribution(name, x.shape, args)
    with pytest.raises(KeyError):
        initial_weights.distribution("layers.0.attention.new.weight", torch.Size((2, 2)), ARGS)
