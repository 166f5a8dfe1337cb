"""Cached keys and values in decoding against passes over whole rows; the FFN in chunks."""

from dataclasses import replace

import pytest
import torch

from memdlm_dist.inference import sampler
from memdlm_dist.inference.canvas import canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.inference.sampler import Decoder
from memdlm_dist.method import fast_weight_tree, fast_weights
from memdlm_dist.models.key_value_cache import CachedPass, KeyValueCache
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.llada_moe import LLaDAMoEArgs
from memdlm_dist.models.mixture import LLaDAMixture
from memdlm_dist.models.token_choice import TokenChoice
from tests.support.bilevel import ARGS, MASK_ID, build, change_in_chunks, double, memory

SLOTS, LENGTH, EOS = 3, 10, 0


@pytest.fixture(scope="module")
def model():
    return build().eval()


def fast_weights_of(args, **options):
    """Return random fast weights, one set per slot, that change the result."""
    generator = torch.Generator().manual_seed(4)
    drawn = memory(**options).draw(3, 0, torch.arange(SLOTS))
    return double(fast_weight_tree.map_leaves(lambda x: 0.3 * torch.randn(x.shape, generator=generator), drawn))


def test_a_pass_stores_its_tokens_and_attends_to_whole_rows():
    """Compare with tensors that are written one token at a time; slot s, head h and column w have the value of x."""
    cache, heads, width = KeyValueCache(SLOTS, LENGTH + 1), 2, 4
    expected = torch.zeros(2, SLOTS, heads, LENGTH + 1, width)
    generator = torch.Generator().manual_seed(0)
    everything = list(range(SLOTS))
    spare = LENGTH
    for number, (slots, positions, length) in enumerate(
        [
            (everything, None, LENGTH),
            ([2, 0], None, 7),
            (everything, [[1, 2], [3, spare], [9, 0]], LENGTH),
            ([1], [[4, 5, 6]], 8),
            ([2, 1], [[0, spare, spare], [7, 8, 9]], LENGTH),
        ]
    ):
        tokens = length if positions is None else len(positions[0])
        new = torch.randn(2, len(slots), heads, tokens, width, generator=generator)
        position_BT = None if positions is None else torch.tensor(positions)
        used = CachedPass(cache, torch.tensor(slots), slots == everything, position_BT, length, number=1)
        got = used.update(*new)
        for row, slot in enumerate(slots):
            for column in range(tokens):
                position = column if positions is None else positions[row][column]
                expected[:, slot, :, position] = new[:, row, :, column]
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs[slots][:, :, :length]), number
    assert not cache.layer(0, new[0])[0].any(), "every layer has its own"


def read(reader, slots, lengths, targets, ranges, tokens_SW, blank_SW=None):
    """Return the chosen ids and confidences at some positions, `[2, R, K]`."""
    reading = reader.plan(slots, lengths, targets, ranges)

    def gathered(x_SW):
        x_RW = x_SW[slots]
        return x_RW[:, : reading.length] if reading.position_RT is None else x_RW.gather(1, reading.position_RT)

    choice = TokenChoice(reading.row_RK.flatten(), torch.tensor([MASK_ID]))
    blank_RT = None if blank_SW is None else gathered(blank_SW)
    return reader.choose(reading, gathered(tokens_SW), blank_RT, choice).unflatten(1, reading.row_RK.shape)


def random_tokens():
    return torch.randint(0, MASK_ID, (SLOTS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def close(a, b):
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=0.0)  # float32 confidences


LENGTHS, BLOCKS, RANGES = [9, 6, 8], [[3, 4], [2, 5], [6, 7]], [range(3, 5), range(2, 6), range(5, 8)]


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_pass_over_unchanged_rows_is_the_whole_pass(model, shifted, guidance, with_memory):
    """Rows of other lengths, blocks of other places and sizes, any subset of slots in any order."""
    reader = ModelReader(
        model, SLOTS, LENGTH, torch.device("cpu"), cached=True, shifted=shifted, guidance=guidance,
        fast=fast_weights_of(ARGS) if with_memory else None,
    )  # fmt: skip
    tokens = random_tokens()
    blank = tokens.flip(0) if guidance else None
    ranges = [range(x.start - shifted, x.stop) for x in RANGES]
    whole = read(reader, [0, 1, 2], LENGTHS, BLOCKS, None, tokens, blank)
    assert whole[0].unique().numel() > 3
    for slots in ([0, 1, 2], [2, 0], [1]):
        some = [[x[slot] for slot in slots] for x in (LENGTHS, BLOCKS, ranges)]
        close(read(reader, slots, *some, tokens, blank), whole[:, slots])
        close(read(reader, slots, *some[:2], None, tokens, blank), whole[:, slots])


def test_cached_keys_are_exact_with_block_causal_attention_alone(model):
    """The tokens of a block change. Those before it do not see it, so that their keys and values stay as they were."""
    before, after = random_tokens(), random_tokens()
    after[:, 4:8] = 7
    results = {}
    for causal_block in (4, None):
        plain, cached = (
            ModelReader(model, SLOTS, LENGTH, torch.device("cpu"), cached=cached, causal_block=causal_block)
            for cached in (False, True)
        )
        places = [[0, 1, 2], [9, 8, 8], [[4, 5, 7]] * 3]
        old, inside, later = read(cached, *places, None, before), before.clone(), before.clone()
        inside[:, 6], later[:, 8:] = 7, 7
        change = old[1] / read(plain, *places, None, inside)[1] - 1
        assert change.abs().max() > 1e-3, "tokens attend to their whole block"
        assert torch.equal(old, read(plain, *places, None, later)) == (causal_block is not None)
        results[causal_block] = (
            read(plain, *places, None, after),
            read(cached, *places, [range(4, 8)] * 3, after),
        )
    close(*results[4])
    exact, approximate = results[None]
    assert (exact[1] / approximate[1] - 1).abs().max() > 1e-3, "an approximation with full attention"


def decode(model, decoding, fast=None, autocast=None, **options):
    start = canvas([[5, 6, 7, 8, 9], [4], [MASK_ID, 3, 2]], 5, MASK_ID, EOS)
    rows, length = start.tokens_BL.shape
    causal_block = decoding.block_size if decoding.attention == "block_causal" else None
    reader = ModelReader(
        model, rows, length, torch.device("cpu"), cached=decoding.cache != "none", causal_block=causal_block,
        guidance=decoding.cfg_scale, autocast=autocast, fast=fast,
    )  # fmt: skip
    decoder = Decoder(reader, decoding, rows, length, MASK_ID, EOS, **options)
    decoder.load(range(rows), start)
    return sampler.finished(sampler.steps(decoder, length), start)


@pytest.mark.parametrize(
    "settings, exact",
    [
        ({}, [{"cache": "prefix", "cache_refresh": 1}, {"cache": "dual", "cache_refresh": 1}]),
        ({"cfg_scale": 1.0, "temperature": 0.5}, [{"cache": "dual", "cache_refresh": 1}]),
        ({"attention": "block_causal"}, [{"cache": "prefix"}, {"cache": "dual", "cache_refresh": 2}]),
        ({"attention": "block_causal", "cfg_scale": 1.0, "threshold": 0.3}, [{"cache": "dual"}]),
        ({"attention": "block_causal", "threshold": 0.3, "steps": 2}, [{"cache": "prefix"}]),
        ({"attention": "block_causal", "threshold": 0.1, "edit_threshold": 0.05, "post_steps": 2}, [{"cache": "dual"}]),
    ],
)
def test_exact_caches_give_the_tokens_of_whole_passes(model, settings, exact):
    """Rows read with memory, in one pass or in passes of their own."""
    fast, common = fast_weights_of(ARGS), {"block_size": 3, "stop_at_eos": False} | settings
    plain = decode(model, Decoding(**common), fast)
    assert plain[:, 3:].unique().numel() > 6
    assert torch.equal(decode(model, Decoding(**common), fast, pass_tokens=1), plain)
    for options in exact:
        assert torch.equal(decode(model, Decoding(**common, **options), fast), plain), options


def test_exact_caches_are_exact_in_bfloat16():
    """Autocast, and queries and keys from a norm, whose dtype is not that of the values; rows as long as the table."""
    torch.manual_seed(0)
    model = LLaDA(replace(ARGS, qk_norm=True, max_seq_len=10))
    with torch.no_grad():
        model.init_weights()
        for name, weight in model.named_parameters():
            if "layers" in name and "norm" not in name:
                weight.mul_(6)
    amp = torch.autocast("cpu", torch.bfloat16)
    for settings in ({"cache_refresh": 1}, {"attention": "block_causal"}):
        plain = Decoding(3, stop_at_eos=False, cfg_scale=1.0, attention=settings.get("attention", "full"))
        cached = Decoding(3, stop_at_eos=False, cfg_scale=1.0, cache="dual", **settings)
        tokens = decode(model, plain, autocast=amp)
        assert tokens[:, 3:].unique().numel() > 4
        assert torch.equal(decode(model, cached, autocast=amp), tokens), settings


@pytest.mark.parametrize("ffn_tokens", [1, 7, 10, 47])
def test_the_ffn_in_chunks_is_the_whole_one(model, ffn_tokens):
    """Fewer tokens than rows, a part of a row, and two rows less a token; float64."""
    fast = fast_weight_tree.select(fast_weights_of(ARGS), [0, 2], SLOTS)
    widths = []
    with_width = model.layers["2"].feed_forward.register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    assert change_in_chunks(model, 24, ffn_tokens, fast=fast) < 1e-12
    with_width.remove()
    size = max(1, ffn_tokens // 2)
    assert widths == [24, *[size] * (24 // size), *([24 % size] if 24 % size else [])]


def test_experts_in_chunks_are_the_whole_ones():
    torch.manual_seed(0)
    args = LLaDAMoEArgs(dim=32, n_layers=2, n_heads=4, hidden_dim=16, vocab_size=61, n_experts=4, experts_per_token=2)
    model = LLaDAMixture(args)
    with torch.no_grad():
        model.init_weights()
    linears = args.adapted_linears(1, ["ffn"])
    drawn = fast_weights.draw("lora", linears, 4, 8.0, fast_weights.keys(3, 0, torch.arange(2)))
    fast = fast_weight_tree.map_leaves(lambda x: torch.randn(x.shape), drawn)
    # float32: chunks differ by rounding.
    assert change_in_chunks(model.eval(), 24, 10, fast=fast) < 1e-5
