"""Denoising loop on toy predictions against a naive version; canvas layout and keyed noise."""

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdlm_dist.inference import sampler
from memdlm_dist.inference.sampler import Decoding, canvas, denoise, finished, responses
from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream

VOCABULARY, MASK, EOS = 11, 10, 0


def toy_logits(tokens, position):
    """Return logits keyed by the row's content and the position."""
    key = torch.tensor([hash((tuple(tokens), position)) % 2**40])
    return 4 * keyed_random.uniform(key, torch.arange(VOCABULARY)).squeeze(0)


def toy(start, log=None):
    def predict(tokens_BL, target_BL):
        if log is not None:
            log.append(target_BL.clone())
        rows = [tokens[attended].tolist() for tokens, attended in zip(tokens_BL, start.attended_BL, strict=True)]
        return torch.stack([toy_logits(rows[row], position) for row, position in target_BL.nonzero().tolist()])

    return predict


def run(prompts, new_tokens, decoding, ids=None):
    start = canvas(prompts, new_tokens, MASK, EOS, ids)
    return finished(denoise(toy(start), start, decoding, MASK, EOS), start)


def naive_decode(prompt, new_tokens, decoding, row_id):
    """Decode one row as a list of tokens, with a dictionary of predictions per step."""
    row = [*prompt, *[MASK] * new_tokens]
    holes = [i for i, token in enumerate(row) if token == MASK]
    n_decoded = 0
    for _, group in groupby(enumerate(holes), key=lambda pair: pair[0] // decoding.block_size):
        block = [position for _, position in group]
        steps = decoding.steps or decoding.block_size
        for steps_left in range(steps, 0, -1):
            exact = len(block) / steps_left
            share = int(exact) + (exact % 1 > 0.5 or (exact % 1 == 0.5 and int(exact) % 2 == 1))
            confidence, token = {}, {}
            for position in block:
                logits = toy_logits(row, position)
                if decoding.cfg_scale:
                    blank = toy_logits([x if i in holes else MASK for i, x in enumerate(row)], position)
                    logits = blank + (decoding.cfg_scale + 1) * (logits - blank)
                for never in (MASK, *decoding.suppress_tokens):
                    logits[never] = -torch.inf
                key = keyed_random.key(
                    decoding.seed, Stream.DECODING, n_decoded, torch.tensor([row_id * 2**24 + position])
                )  # fmt: skip
                u = keyed_random.uniform(key, torch.arange(1 + VOCABULARY)).squeeze(0)
                noisy = logits
                if decoding.temperature:
                    noisy = logits - decoding.temperature * torch.log(-torch.log(u[1:].clamp(min=2**-53)))
                token[position] = int(noisy.argmax())
                random = decoding.remasking == "random"
                confidence[position] = float(u[0]) if random else float(logits.softmax(0)[token[position]])
            for position in sorted(block, key=lambda position: -confidence[position])[:share]:
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


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=3),
    new_tokens=st.integers(0, 7),
    block=st.integers(1, 5),
    steps=st.one_of(st.none(), st.integers(1, 6)),
    temperature=st.sampled_from([0.0, 0.7]),
    remasking=st.sampled_from(["low_confidence", "random"]),
    stop=st.booleans(),
    cfg_scale=st.sampled_from([0.0, 0.5, 2.0]),
    suppressed=st.sampled_from([(), (EOS, 5), (MASK, 1, 2, 3)]),
)
def test_batches_are_as_the_naive_rows(
    prompts, new_tokens, block, steps, temperature, remasking, stop, cfg_scale, suppressed
):
    decoding = Decoding(block, steps, temperature, remasking, stop, 3, cfg_scale, suppressed)
    ids = [7 * number + 1 for number in range(len(prompts))]
    tokens_BL = run(prompts, new_tokens, decoding, ids)
    for row, (prompt, tokens) in enumerate(zip(prompts, tokens_BL.tolist(), strict=True)):
        length = len(prompt) + new_tokens
        assert tokens[:length] == naive_decode(prompt, new_tokens, decoding, ids[row])
        assert tokens[length:] == [EOS] * (len(tokens) - length)
        given_positions = [i for i, token in enumerate(prompt) if token != MASK]
        assert all(tokens[i] == prompt[i] for i in given_positions)
        filled = {token for i, token in enumerate(tokens[:length]) if i not in given_positions}
        assert filled.isdisjoint({*suppressed} - {EOS})
    assert (tokens_BL != MASK).all()


def test_as_many_predictions_as_steps():
    start = canvas([[1, 2], [3]], 8, MASK, EOS)
    log = []
    steps = list(denoise(toy(start, log), start, Decoding(4, 3, stop_at_eos=False), MASK, EOS))
    assert len(log) == len(steps) == 6  # two blocks of three steps
    # 4 tokens in 3 steps: 4/3 rounds to 1, 3/2 rounds half to even to 2, and 1 remains.
    assert [int(step.kept_BL[0].sum()) for step in steps] == [1, 2, 1] * 2
    assert all(step.kept_BL.sum(1).unique().numel() == 1 for step in steps)
    assert not steps[-1].open_BL.any()
    guided = list(denoise(toy(start, log), start, Decoding(4, 3, stop_at_eos=False, cfg_scale=1.0), MASK, EOS))
    assert len(guided) == 6 and len(log) == 6 + 12


def test_ranks_that_have_less_to_do_keep_up():
    """Ranks without open positions run as many predictions as the others, because each one is a collective."""
    start = canvas([[1, MASK]], 0, MASK, EOS)
    log = []
    list(
        denoise(
            toy_or_nothing(start, log), start, Decoding(4, 3), MASK, EOS, max_over_ranks=lambda count: max(count, 3)
        )
    )
    assert len(log) == 9


def toy_or_nothing(start, log):
    predict = toy(start, log)

    def predicted(tokens_BL, target_BL):
        if target_BL.any():
            return predict(tokens_BL, target_BL)
        log.append(target_BL)
        return torch.zeros(0, VOCABULARY)

    return predicted


def test_what_follows_end_of_text_is_not_predicted():
    def certain(tokens_BL, target_BL):
        logits = torch.zeros(int(target_BL.sum()), VOCABULARY)
        logits[:, torch.tensor(5)] = 1
        positions = target_BL.nonzero()[:, 1]
        logits[positions == 3, EOS] = 9
        return logits

    start = canvas([[1, 2]], 8, MASK, EOS)
    steps = list(denoise(certain, start, Decoding(4, 4), MASK, EOS))
    assert len(steps) == 5  # the second block is filled in one step
    assert steps[-1].tokens_BL.tolist() == [[1, 2, 5, EOS, 5, 5, EOS, EOS, EOS, EOS]]
    assert responses(steps[-1].tokens_BL, start, EOS) == [[5]]
    steps = list(denoise(certain, start, Decoding(4, 4, stop_at_eos=False), MASK, EOS))
    assert len(steps) == 8
    assert steps[-1].tokens_BL[0, 4:].tolist() == [5] * 6


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
    tokens_BL = finished(
        denoise(lambda tokens, target: logits.repeat(int(target.sum()), 1), start, decoding, mask_id=3, eos_id=0), start
    )
    expected = (logits[:3] / temperature).softmax(0)
    observed = torch.bincount(tokens_BL.flatten(), minlength=4)[:3] / rows
    assert ((observed - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all()
    assert sampler.Decoding().temperature == 0
