"""Denoising loop on toy predictions against a naive version; canvas layout and keyed noise."""

from functools import cache
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdlm_dist.errors import UserError
from memdlm_dist.inference import sampler
from memdlm_dist.inference.canvas import canvas, responses
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream
from tests.support.toy_reader import toy_decoder

VOCABULARY, MASK, EOS = 11, 10, 0


@cache
def _toy_logits(place):
    return 4 * keyed_random.uniform(torch.tensor([hash(place) % 2**40]), torch.arange(VOCABULARY)).squeeze(0)


def toy_logits(tokens, position):
    """Return logits keyed by the row's content and the position."""
    return _toy_logits((tuple(tokens), position)).clone()


def toy(rows, targets):
    return torch.stack([toy_logits(rows[row], position) for row, position in targets])


def decoder_of(start, decoding, predict=toy, **options):
    return toy_decoder(predict, decoding, start, MASK, EOS, **options)


def run(prompts, new_tokens, decoding, ids, slots, pass_tokens):
    """Decode rows as slots become free; return each row's tokens, and the padding behind them."""
    whole = canvas(prompts, new_tokens, MASK, EOS)
    decoder, _ = decoder_of(whole, decoding, slots=slots, pass_tokens=pass_tokens)
    waiting, rows, held = list(range(len(prompts))), {}, {}
    while waiting or held:
        free = [slot for slot in range(slots) if slot not in held][: len(waiting)]
        if free:
            entering, waiting = waiting[: len(free)], waiting[len(free) :]
            start = canvas([prompts[i] for i in entering], new_tokens, MASK, EOS, [ids[i] for i in entering])
            decoder.load(free, start)
            held |= dict(zip(free, entering, strict=True))
        decoder.step()
        tokens_BL = decoder.state(whole.tokens_BL.shape[1]).tokens_BL
        for slot in [slot for slot in held if decoder.is_finished(slot)]:
            row = held.pop(slot)
            length = len(prompts[row]) + new_tokens
            rows[row] = tokens_BL[slot, :length].tolist(), tokens_BL[slot, length:].tolist()
            assert decoder.tokens([slot])[0][:length] == rows[row][0]
    assert not decoder.step()
    return [rows[row] for row in range(len(prompts))]


def naive_decode(prompt, new_tokens, decoding, row_id):
    """Decode one row as a list of tokens, with a dictionary of predictions per step."""
    row = [*prompt, *[MASK] * new_tokens]
    holes = [i for i, token in enumerate(row) if token == MASK]
    n_decoded = 0
    by_position = decoding.attention == "block_causal"
    for _, group in groupby(enumerate(holes), key=lambda pair: pair[by_position] // decoding.block_size):
        block = [position for _, position in group]
        steps_left = decoding.steps or decoding.block_size
        while block:
            exact = len(block) / steps_left
            steps_left -= 1
            share = int(exact) + (exact % 1 > 0.5 or (exact % 1 == 0.5 and int(exact) % 2 == 1))
            confidence, token = {}, {}
            for position in block:
                logits = toy_logits(row, position)
                if decoding.cfg_scale:
                    blank = toy_logits([x if i in holes else MASK for i, x in enumerate(row)], position)
                    logits = blank + (decoding.cfg_scale + 1) * (logits - blank)
                for never in decoding.suppress_tokens:
                    logits[never] = -torch.inf
                probability = logits.softmax(0)  # [MASK] is never predicted, but is as probable as it is
                logits[MASK] = -torch.inf
                key = keyed_random.key(
                    decoding.seed, Stream.DECODING, n_decoded, torch.tensor([row_id * 2**24 + position])
                )  # fmt: skip
                u = keyed_random.uniform(key, torch.arange(1 + VOCABULARY)).squeeze(0)
                noisy = logits
                if decoding.temperature:
                    noisy = logits - decoding.temperature * torch.log(-torch.log(u[1:].clamp(min=2**-53)))
                token[position] = int(noisy.argmax())
                random = decoding.remasking == "random"
                confidence[position] = float(u[0]) if random else float(probability[token[position]])
            best = sorted(block, key=lambda position: -confidence[position])
            if decoding.threshold is not None:
                share = max(decoding.min_tokens, sum(confidence[position] > decoding.threshold for position in block))
            for position in best[:share]:
                row[position] = token[position]
                block.remove(position)
                n_decoded += 1
        if decoding.stop_at_eos and EOS in (response := row[len(prompt) :]):
            row[len(prompt) + response.index(EOS) :] = [
                EOS if token == MASK else token for token in response[response.index(EOS) :]
            ]
            return row
    return row


prompt = st.lists(st.integers(0, MASK), max_size=5)


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=4),
    new_tokens=st.integers(0, 7),
    block=st.integers(1, 5),
    pace=st.sampled_from(
        [
            {},
            *({"steps": n} for n in (1, 2, 3, 6)),
            *({"threshold": p} for p in (0.0, 0.3, 0.6, 1.0)),
            {"threshold": 0.5, "min_tokens": 2},
        ]
    ),
    temperature=st.sampled_from([0.0, 0.7]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    stop=st.booleans(),
    cfg_scale=st.sampled_from([0.0, 0.5, 2.0]),
    suppressed=st.sampled_from([(), (EOS, 5), (MASK, 1, 2, 3)]),
    caching=st.sampled_from([("none", 0), ("prefix", 0), ("dual", 0), ("dual", 2), ("prefix", 1)]),
    attention=st.sampled_from(["full", "block_causal"]),
    slots=st.integers(1, 4),
    pass_tokens=st.sampled_from([1, 12, 2**17]),
)
def test_rows_are_as_the_naive_ones(
    prompts, new_tokens, block, pace, temperature, remasking, stop, cfg_scale, suppressed, caching, attention,
    slots, pass_tokens,
):  # fmt: skip
    """Rows enter free slots at any time and share passes; toy predictions are exact in cached passes too."""
    if "threshold" in pace:
        remasking = "low_confidence"
    decoding = Decoding(
        block, temperature=temperature, remasking=remasking, stop_at_eos=stop, seed=3, cfg_scale=cfg_scale,
        suppress_tokens=suppressed, cache=caching[0], cache_refresh=caching[1], attention=attention, **pace,
    )  # fmt: skip
    ids = [7 * number + 1 for number in range(len(prompts))]
    decoded = run(prompts, new_tokens, decoding, ids, slots, pass_tokens)
    for prompt, row_id, (tokens, padding) in zip(prompts, ids, decoded, strict=True):
        assert tokens == naive_decode(prompt, new_tokens, decoding, row_id)
        assert set(padding) <= {EOS}
        given_positions = [i for i, token in enumerate(prompt) if token != MASK]
        assert all(tokens[i] == prompt[i] for i in given_positions)
        filled = {token for i, token in enumerate(tokens) if i not in given_positions}
        assert filled.isdisjoint({MASK, *suppressed} - {EOS})


def test_as_many_passes_as_steps():
    start = canvas([[1, 2], [3]], 8, MASK, EOS)
    decoder, reader = decoder_of(start, Decoding(4, 3, stop_at_eos=False))
    steps = list(sampler.steps(decoder, 10))
    assert decoder.passes == len(reader.passes) == len(steps) == 6  # two blocks of three steps
    assert all(each.slots == [0, 1] and each.read is None for each in reader.passes)
    # 4 tokens in 3 steps: 4/3 rounds to 1, 3/2 rounds half to even to 2, and 1 remains. Only open positions are read.
    assert [int(step.kept_BL[0].sum()) for step in steps] == [1, 2, 1] * 2
    assert [len(each.targets) for each in reader.passes] == [2 * 4, 2 * 3, 2 * 1] * 2
    assert all(step.kept_BL.sum(1).unique().numel() == 1 for step in steps)
    assert not steps[-1].open_BL.any()
    guided, reader = decoder_of(start, Decoding(4, 3, stop_at_eos=False, cfg_scale=1.0))
    assert len(list(sampler.steps(guided, 10))) == len(reader.passes) == 6 and guided.passes == 12


def test_a_threshold_keeps_all_above_it_and_at_least_one():
    def predict(rows, targets):
        """Return logits whose largest probability is 0.9 at even positions, and less than 0.6 at others."""
        logits = torch.zeros(len(targets), VOCABULARY, dtype=torch.float64)
        for logit, (_, position) in zip(logits, targets, strict=True):
            logit[3] = 4.5 if position % 2 == 0 else 2.5 - position / 100
        return logits

    start = canvas([[], [1]], 6, MASK, EOS)
    for threshold, kept in ((0.6, [[3, 1, 1, 1], [3, 1, 1, 1]]), (0.0, [[6], [6]]), (1.0, [[1] * 6, [1] * 6])):
        decoder, _ = decoder_of(start, Decoding(6, threshold=threshold, stop_at_eos=False), predict)
        steps = list(sampler.steps(decoder, 7))
        assert [[int(step.kept_BL[row].sum()) for step in steps] for row in (0, 1)] == kept
        assert decoder.passes == len(steps)


def test_whole_rows_are_divided_into_passes():
    start = canvas([[1] * n for n in (2, 5, 1, 9, 1)], 1, MASK, EOS)
    decoder, reader = decoder_of(start, Decoding(1), pass_tokens=9)
    assert decoder.step() and not decoder.step()
    assert [each.slots for each in reader.passes] == [[0], [1], [2], [3], [4]]
    decoder, reader = decoder_of(start, Decoding(1), pass_tokens=12)
    decoder.step()
    assert [each.slots for each in reader.passes] == [[0, 1], [2], [3], [4]] and decoder.passes == 4


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_ranks_that_have_less_to_do_keep_up(cfg_scale):
    """A rank takes part in as many passes as the others have, because each one is a collective."""
    others = iter([1, 1, 2, 0])
    start = canvas([[1, MASK]], 0, MASK, EOS)
    decoder, reader = decoder_of(
        start, Decoding(4, cfg_scale=cfg_scale), max_over_ranks=lambda count: max(count, next(others))
    )
    assert [decoder.step() for _ in range(4)] == [True, True, True, False]
    assert len(reader.passes) == 1
    assert reader.idle_passes == 3 * (2 if cfg_scale else 1)


@pytest.mark.parametrize(
    "lookback, options, reads",
    [
        (0, {}, [None] * 5),
        (0, {"cache": "prefix"}, [None, range(3, 8), None, range(5, 8), None]),
        (0, {"cache": "dual"}, [None, range(3, 5), None, range(5, 7), None]),
        (1, {"cache": "prefix"}, [None, range(2, 8), None, range(4, 8), None]),
        (1, {"cache": "dual"}, [None, range(2, 5), None, range(4, 7), None]),
        (0, {"cache": "dual", "cache_refresh": 1}, [None] * 5),
        (0, {"cache": "dual", "cache_refresh": 2, "block_size": 4}, [None, range(3, 7), None, range(3, 7), None]),
        (0, {"cache": "dual", "threshold": 0.0}, [None, None, None]),
        # Blocks [3], [4, 5] and [6, 7]; a block's first pass also reads the block before it, which has just changed.
        (0, {"attention": "block_causal"}, [None] * 5),
        (
            0,
            {"attention": "block_causal", "cache": "prefix"},
            [None, range(2, 6), range(4, 6), range(4, 8), range(6, 8)],
        ),
        (
            1,
            {"attention": "block_causal", "cache": "dual"},
            [None, range(1, 6), range(3, 6), range(3, 8), range(5, 8)],
        ),
        (
            0,
            {"attention": "block_causal", "cache": "dual", "cache_refresh": 1},
            [None, range(2, 6), None, range(4, 8), None],
        ),
    ],
)
def test_cached_passes_read_only_what_may_have_changed(lookback, options, reads):
    """A prompt of three tokens and five [MASK]s, positions 3 to 7, in blocks of two."""
    start = canvas([[1, 2, 3]], 5, MASK, EOS)
    decoding = Decoding(**{"block_size": 2, "stop_at_eos": False} | options)
    decoder, reader = decoder_of(start, decoding, lookback=lookback)
    list(sampler.steps(decoder, 8))
    assert [each.read and each.read[0] for each in reader.passes] == reads


def test_rows_that_need_whole_and_cached_passes_share_a_step():
    """The second row enters a step later: its whole pass and the first row's cached pass are parts of one step."""
    start = canvas([[1], [2]], 3, MASK, EOS)
    decoder, reader = decoder_of(start, Decoding(3, stop_at_eos=False, cache="dual"), slots=2)
    decoder.load([1], canvas([[1]], 3, MASK, EOS))
    decoder.step()
    decoder.load([0], canvas([[2]], 3, MASK, EOS, [5]))
    decoder.step()
    decoder.step()
    assert [(each.slots, each.read) for each in reader.passes] == [
        ([1], None), ([0], None), ([1], [range(1, 4)]), ([0, 1], [range(1, 4)] * 2),
    ]  # fmt: skip
    assert [decoder.is_finished(slot) for slot in (0, 1)] == [False, True]


def test_a_row_replaces_one_that_is_not_finished():
    decoding = Decoding(3, stop_at_eos=False)
    decoder, _ = decoder_of(canvas([[1, 2]], 4, MASK, EOS), decoding)
    decoder.step()
    decoder.load([0], canvas([[3, 4, 5]], 3, MASK, EOS, [9]))
    while decoder.step():
        pass
    assert decoder.tokens([0]) == [naive_decode([3, 4, 5], 3, decoding, 9)]


def test_what_follows_end_of_text_is_not_predicted():
    def certain(rows, targets):
        logits = torch.zeros(len(targets), VOCABULARY)
        logits[:, 5] = 1
        logits[[position == 3 for _, position in targets], EOS] = 9
        return logits

    start = canvas([[1, 2]], 8, MASK, EOS)
    decoder, _ = decoder_of(start, Decoding(4, 4), certain)
    steps = list(sampler.steps(decoder, 10))
    assert len(steps) == decoder.passes == 4  # the second block is filled in by the step that completes the first
    assert [int(step.kept_BL.sum()) for step in steps] == [1, 1, 1, 1 + 4]
    assert steps[-1].tokens_BL.tolist() == [[1, 2, 5, EOS, 5, 5, EOS, EOS, EOS, EOS]]
    assert responses(steps[-1].tokens_BL, start, EOS) == [[5]]
    decoder, _ = decoder_of(start, Decoding(4, 4, stop_at_eos=False), certain)
    steps = list(sampler.steps(decoder, 10))
    assert len(steps) == 8
    assert steps[-1].tokens_BL[0, 4:].tolist() == [5] * 6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 0}, "block_size = 0 and steps = None must be at least 1"),
        ({"temperature": -0.5}, "The temperature must be a finite number of at least 0, but is -0.5."),
        ({"remasking": "lowest"}, "remasking must be one of low_confidence, random, not lowest."),
        ({"cache": "all"}, "cache must be one of none, prefix, dual, not all."),
        ({"attention": "causal"}, "attention must be one of full, block_causal, not causal."),
        ({"cfg_scale": float("inf")}, "cfg_scale must be a finite number of at least 0, but is inf."),
        ({"threshold": 1.5}, "The confidence threshold must be a probability from 0 to 1, but is 1.5."),
        ({"threshold": float("nan")}, "The confidence threshold must be a probability from 0 to 1, but is nan."),
        (
            {"threshold": 0.9, "remasking": "random"},
            "A confidence threshold and random remasking exclude each other (random remasking has no confidences); "
            "omit one of them.",
        ),
        ({"threshold": 0.9, "min_tokens": 0}, "The number of tokens kept per step must be at least 1, but is 0."),
        ({"min_tokens": 2}, "A minimum of 2 tokens per step needs a confidence threshold"),
        ({"threshold": 0.9, "steps": 4, "min_tokens": 2}, "exclude each other (both set the quota of a step)"),
        (
            {"threshold": 0.9, "edit_threshold": -0.1},
            "The confidence threshold of editing must be a probability from 0 to 1, but is -0.1.",
        ),
        (
            {"edit_threshold": 0.9, "remasking": "random"},
            "Editing above a confidence (0.9) needs a confidence threshold (a fixed number of steps has none); give a "
            "threshold too.",
        ),
        ({"post_steps": 3}, "Steps after a complete block (3) are for editing; give its confidence threshold too"),
        (
            {"threshold": 0.9, "edit_threshold": 0.5, "post_steps": -1},
            "The steps of editing after a complete block must be at least 0, but are -1.",
        ),
        ({"threshold": 0.9, "leave_masks": True, "stop_at_eos": False}, "leave_masks needs a threshold, attention ="),
        (
            {"cache": "dual", "cache_refresh": -1},
            "The cache refresh must be a number of steps of at least 0, but is -1.",
        ),
        (
            {"cache_refresh": 3},
            "A cache refresh (every 3 steps) needs a cache; choose the cache prefix or dual, or omit the refresh.",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(UserError) as refused:
        Decoding(**settings)
    assert message in str(refused.value) and str(refused.value).count("\n") == 0


@pytest.mark.parametrize("suppressed, message", [((11,), "11 is outside"), (tuple(range(10)), "leave no token")])
def test_a_token_is_left_to_predict(suppressed, message):
    with pytest.raises(UserError, match=message):
        Decoding(suppress_tokens=suppressed).check_vocabulary(VOCABULARY)


@pytest.mark.parametrize("multiple", [1, 4])
def test_canvas(multiple):
    start = canvas([[1, MASK, 2], []], [2, 1], MASK, EOS, multiple=multiple)
    length = 5 if multiple == 1 else 8
    assert start.tokens_BL.shape == (2, length)
    assert start.tokens_BL[:, :5].tolist() == [[1, MASK, 2, MASK, MASK], [MASK, EOS, EOS, EOS, EOS]]
    assert start.attended_BL.sum(1).tolist() == [5, 1]
    assert start.open_BL.sum(1).tolist() == [3, 1]
    assert start.response_BL.sum(1).tolist() == [2, 1]


def test_a_key_for_every_entry_is_the_key_of_its_step():
    ids, steps = torch.arange(5), torch.tensor([0, 1, 7, 2**40, 3])
    together = keyed_random.key(9, Stream.DECODING, steps, ids)
    apart = [keyed_random.key(9, Stream.DECODING, int(step), ids[i : i + 1]) for i, step in enumerate(steps)]
    assert torch.equal(together, torch.cat(apart))


def test_gumbel_noise_samples_the_softmax():
    """Frequencies over 4,000 rows are within 4 standard errors of the softmax at the temperature."""
    logits, temperature, rows = torch.tensor([1.0, 0.0, -1.0, 2.0]), 0.5, 4000
    start = canvas([[]] * rows, 1, 3, 0)
    decoding = Decoding(1, 1, temperature=temperature, stop_at_eos=False)
    decoder, _ = toy_decoder(lambda _, targets: logits.repeat(len(targets), 1), decoding, start, mask_id=3, eos_id=0)
    tokens_BL = sampler.finished(sampler.steps(decoder, 1), start)
    expected = (logits[:3] / temperature).softmax(0)
    observed = torch.bincount(tokens_BL.flatten(), minlength=4)[:3] / rows
    assert ((observed - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all()
    assert Decoding().temperature == 0
