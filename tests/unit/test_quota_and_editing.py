"""Decoding with a quota and a threshold, and with editing, against a naive version of the published samplers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memdlm_dist.inference.canvas import canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.row_schedule import Outcome, RowSchedule
from memdlm_dist.inference.sampler import Decoder
from tests.support.toy_reader import CachedToyReader

VOCABULARY, MASK, EOS = 7, 6, 0
LOGITS = 2 * torch.randn(2**16, VOCABULARY, generator=torch.Generator().manual_seed(0)).double()
PROBABILITY = LOGITS.softmax(-1).tolist()
BEST = LOGITS[:, :MASK].argmax(-1).tolist()


def reader_of(decoding, lookback):
    return CachedToyReader(LOGITS, decoding.block_size if decoding.attention == "block_causal" else 64, lookback)


def naive_canvases(prompt, new_tokens, decoding, lookback):
    """Decode one prompt with whole forward passes; return the canvases before the first step and after every step."""
    row, size, history = [*prompt, *[MASK] * new_tokens], decoding.block_size, []
    model, is_prompt = reader_of(decoding, lookback), [token != MASK for token in row]
    history.append([*row])
    for start in range(0 if decoding.attention == "block_causal" else len(prompt), len(row), size):
        block, post_steps, step = range(start, min(start + size, len(row))), 0, 0
        if MASK not in row[start : start + size]:
            continue
        while True:
            masked = [p for p in block if row[p] == MASK]
            if not masked and decoding.edit_threshold is None:
                break
            if not masked:
                post_steps += 1
                if post_steps > decoding.post_steps:
                    break
            keys = model.new_keys(row, range(len(row)))
            entry = {p: model.entry(keys, p) for p in block if masked or not is_prompt[p]}
            token = {p: BEST[e] for p, e in entry.items()}
            confidence = {p: PROBABILITY[e][BEST[e]] for p, e in entry.items()}
            quota = decoding.min_tokens
            if decoding.steps:
                quota = [size // decoding.steps] * decoding.steps
                for k in range(size % decoding.steps):
                    quota[k] += 1
                quota = [*quota, *[0] * 99][step]
            chosen = [p for p in masked if confidence[p] > decoding.threshold]
            if len(chosen) < quota:
                chosen = sorted(masked, key=lambda p: -confidence[p])[:quota]
            edited = []
            if decoding.edit_threshold is not None:
                edited = [
                    p for p in block
                    if p not in masked and not is_prompt[p] and confidence[p] > decoding.edit_threshold
                    and token[p] != row[p]
                ]  # fmt: skip
            for p in (*chosen, *edited):
                row[p] = token[p]
            step += 1
            history.append([*row])
            if decoding.leave_masks and EOS in row[start : start + size]:
                break
            if decoding.edit_threshold is not None and not masked and not edited:
                break
        if decoding.stop_at_eos and EOS in row[len(prompt) :]:
            history[-1] = [EOS if token == MASK else token for token in row]
            break
    return history


def canvases(prompts, new_tokens, decoding, lookback, delay, pass_tokens=2**17):
    """Decode prompts together, each one `delay` steps after the one before it; return the canvases of each."""
    lengths = [len(prompt) + n for prompt, n in zip(prompts, new_tokens, strict=True)]
    decoder = Decoder(
        reader_of(decoding, lookback), decoding, len(prompts), max(lengths), MASK, EOS, pass_tokens=pass_tokens
    )
    history, step = [[] for _ in prompts], 0
    while True:
        for row, (prompt, n) in enumerate(zip(prompts, new_tokens, strict=True)):
            if row * delay == step:
                start = canvas([prompt], n, MASK, EOS)
                decoder.load([row], start)
                history[row].append(start.tokens_BL[0].tolist())
        running = [row for row in range(len(prompts)) if not decoder.is_finished(row)]
        if not decoder.step() and step > delay * len(prompts):
            return history
        state, step = decoder.state(max(lengths)), step + 1
        for row in running:
            after, before = state.tokens_BL[row, : lengths[row]].tolist(), history[row][-1]
            kept = state.kept_BL[row, : lengths[row]].tolist()
            assert kept == [new != old for new, old in zip(after, before, strict=True)]
            history[row].append(after)


PACE = [{"steps": n} for n in (1, 2, 3, 5, 9)] + [{"min_tokens": n} for n in (1, 2, 4)]
EDITING = [{}, *({"edit_threshold": p, "post_steps": n} for p, n in ((0.0, 3), (0.4, 0), (0.4, 1), (0.5, 16)))]
END = [{}, {"stop_at_eos": False}, {"stop_at_eos": False, "leave_masks": True}]
CACHING = [{"cache": cache, "cache_refresh": n} for cache, n in (("none", 0), ("prefix", 0), ("dual", 0), ("dual", 3))]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, MASK), max_size=9), st.integers(0, 11)), min_size=1, max_size=4
    ),
    block=st.integers(1, 8),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
    pace=st.sampled_from(PACE),
    editing=st.sampled_from(EDITING),
    end=st.sampled_from(END),
    caching=st.sampled_from(CACHING),
    attention=st.sampled_from(["block_causal", "block_causal", "full"]),
    lookback=st.integers(0, 1),
    delay=st.integers(0, 2),
    pass_tokens=st.sampled_from([1, 2**17]),
)  # fmt: skip
def test_canvases_are_those_of_the_published_samplers(
    rows, block, threshold, pace, editing, end, caching, attention, lookback, delay, pass_tokens
):
    """Ragged prompts with [MASK]s, decoded together, with an exact cache of complete blocks or none."""
    prompts, new_tokens = [[3, *prompt] for prompt, _ in rows], [n for _, n in rows]
    if attention == "full":  # blocks are counted from the first [MASK], and a cache is approximate
        prompts = [[token for token in prompt if token != MASK] for prompt in prompts]
        end, caching = {"stop_at_eos": end.get("stop_at_eos", True)}, {}
    decoding = Decoding(block, threshold=threshold, attention=attention, **(pace | editing | end | caching))
    decoded = canvases(prompts, new_tokens, decoding, lookback, delay, pass_tokens)
    for prompt, n, history in zip(prompts, new_tokens, decoded, strict=True):
        assert history == naive_canvases(prompt, n, decoding, lookback)


@pytest.mark.parametrize(
    "steps, quotas", [(3, [3, 3, 2]), (12, [1] * 8), (1, [8]), (5, [2, 2, 2, 1, 1])]
)  # fmt: skip
def test_the_quotas_of_a_block_are_those_of_a_whole_one(steps, quotas):
    """A prompt of 5 tokens takes a part of the first block; nothing is above the threshold."""
    row = RowSchedule(Decoding(8, steps, threshold=1.0, attention="block_causal"), 16, range(5, 16))
    for is_open in (3, 8):
        kept = []
        while row.open and len(row.block) == is_open:
            kept.append(min(row.quota, row.open))
            row.advance(Outcome(kept[-1]), read_all=True)
        number = next(n for n in range(len(quotas) + 1) if sum(quotas[:n]) >= is_open)
        assert kept == [*quotas[: number - 1], is_open - sum(quotas[: number - 1])]
    assert row.is_finished


@pytest.mark.parametrize("post_steps, edits", [(0, [1]), (2, [1, 1, 1]), (9, [1, 1, 0]), (9, [0, 0])])
def test_editing_ends_when_nothing_changes(post_steps, edits):
    """The first step fills in the block and edits a token; the steps after it have the numbers of edits `edits[1:]`."""
    decoding = Decoding(4, threshold=0.5, edit_threshold=0.5, post_steps=post_steps)
    row = RowSchedule(decoding, 8, range(8))
    assert row.quota == 1 and row.candidates == 4
    complete = [row.advance(Outcome(4 * (step == 0), edited), read_all=True) for step, edited in enumerate(edits)]
    assert complete == [*[False] * (len(edits) - 1), True] and row.block == [4, 5, 6, 7] and row.open == 4


def test_a_predicted_end_of_text_leaves_the_masks_of_its_block():
    """The published behaviour, by name: end-of-text in the prompt's part ends a block at its first step."""
    decoding = Decoding(
        4, threshold=1.0, attention="block_causal", stop_at_eos=False, leave_masks=True
    )  # fmt: skip
    (history,) = canvases([[3, EOS]], [6], decoding, lookback=0, delay=0)
    assert history == naive_canvases([3, EOS], 6, decoding, 0)
    assert sum(token == MASK for token in history[-1][:4]) == 1
    (ours,) = canvases([[3, EOS]], [6], Decoding(4, threshold=1.0), lookback=0, delay=0)
    assert MASK not in ours[-1]
