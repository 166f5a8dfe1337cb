"""Continuous batching: responses as if each request were alone, whatever the slots and the order."""

import json
from dataclasses import replace

import pytest
import torch

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings
from memdlm_dist.inference.serving import Request, Response, serve
from memdlm_dist.inference.slot_memory import SlotMemory
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import fast_weight_tree, fast_weights
from memdlm_dist.method.fast_weights import AdaptedLinear
from tests.workers.reading import BOLD, FEW, LAYOUTS, PLAIN, PROMPTS, arguments_of

NEW_TOKENS = (6, 9, 3, 12, 0, 5)
SETTINGS = {
    "steps": Decoding(4, 2, stop_at_eos=False),
    "threshold, dual cache": Decoding(4, stop_at_eos=False, threshold=0.3, cache="dual"),
    "quota, editing, warm": Decoding(4, 3, 1.0, stop_at_eos=False, threshold=0.3, edit_threshold=0.0, post_steps=2),
}


@pytest.fixture(scope="module")
def model(trained):
    trained_model = TrainedModel(parse_config.parse([*arguments_of(trained), *BOLD]))
    yield trained_model
    trained_model.close()


@pytest.fixture(scope="module")
def requests(model):
    """Return requests of several lengths, one of them with [MASK]s in its prompt and one with nothing to decode."""
    prompts = model.tokenizer.encode_plain(PROMPTS)
    prompts[3:5] = [*prompts[3], model.mask_id, 7, model.mask_id, 9], [5, 6]
    return [Request(prompt, n, 20 + i) for i, (prompt, n) in enumerate(zip(prompts, NEW_TOKENS, strict=True))]


@pytest.mark.parametrize("memory", [None, AS_PUBLISHED], ids=["off", "on"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_response_is_as_if_its_request_were_alone(model, requests, name, memory):
    """Compare with `generate`, one request at a time; each row reads its own memory."""
    decoding = SETTINGS[name]
    alone = [model.generate([r.prompt], r.new_tokens, decoding, memory, ids=[r.id]) for r in requests]
    passes = {}
    for slots, order in ((1, 1), (2, -1), (3, 1), (8, -1)):
        served = serve(model, requests[::order], decoding, slots, memory)
        responses = served.responses[::order]
        assert [response.response for response in responses] == [made.responses[0] for made in alone], (slots, order)
        for request, response in zip(requests, responses, strict=True):
            assert len(response.prompt) == len(request.prompt) and model.mask_id not in response.prompt
            given = [token != model.mask_id for token in request.prompt]
            pairs = zip(request.prompt, response.prompt, given, strict=True)
            assert all(old == new for old, new, is_given in pairs if is_given)
        assert served.tokens == sum(NEW_TOKENS) + 2 and (served.memory_seconds > 0) == (memory is not None)
        passes[slots] = served.passes
    with_work = [made.passes for request, made in zip(requests, alone, strict=True) if request.new_tokens]
    assert passes[1] == sum(with_work) and passes[8] <= passes[3] < passes[1]


def test_a_response_is_handed_over_at_once(model, requests, monkeypatch):
    """A finished row leaves its slot, and the longest request that waits enters it."""
    seen, entered = [], []
    write = model._writer.write

    def record(prompts, settings, ids, *rest):
        entered.append([ids, [number for number, _ in seen]])
        return write(prompts, settings, ids, *rest)

    monkeypatch.setattr(model._writer, "write", record)
    lengths = [len(request.prompt) + request.new_tokens for request in requests]
    longest = sorted((number for number in range(6) if number != 4), key=lambda number: -lengths[number])
    served = serve(
        model, requests, SETTINGS["steps"], 2, AS_PUBLISHED, on_response=lambda *response: seen.append(response)
    )
    assert sorted(seen) == list(enumerate(served.responses)) and seen[0] == (4, Response([5, 6], []))
    assert [number for numbers, _ in entered for number in numbers] == [20 + number for number in longest]
    assert [len(numbers) for numbers, _ in entered][:2] == [2, 1] and entered[0][1] == [4] and len(entered[1][1]) == 2


def test_nothing_to_serve(model):
    served = serve(model, [], Decoding())
    assert served.responses == [] and served.passes == served.tokens == 0
    served = serve(model, [Request([], 2, 0), Request([], 0, 1)], Decoding(stop_at_eos=False))
    assert [len(response.response) for response in served.responses] == [2, 0]


def test_a_first_token_that_cannot_be_predicted_is_named(trained):
    shifted = TrainedModel(parse_config.parse([*arguments_of(trained), "--model.flavor", "tiny_shifted"]))
    for request in (Request([], 2, 0), Request([shifted.mask_id, 5], 0, 0)):
        with pytest.raises(UserError, match="the first token cannot be"):
            serve(shifted, [Request([5], 2, 0), request], Decoding())
    shifted.close()


@pytest.mark.parametrize("settings", [MemorySettings(refresh="block"), MemorySettings(0.5, 3, "block", "present")])
def test_a_refresh_is_as_if_its_request_were_alone(model, requests, settings):
    requests = [request._replace(new_tokens=min(FEW, request.new_tokens)) for request in requests]
    alone = [model.generate([r.prompt], r.new_tokens, PLAIN, settings, ids=[r.id]) for r in requests]
    served = serve(model, requests, PLAIN, 3, settings)
    assert [response.response for response in served.responses] == [made.responses[0] for made in alone]
    assert served.memory_steps < sum(made.memory_steps for made in alone), "rows are written together"


def test_every_request_begins_with_the_given_memory(model, requests, monkeypatch):
    """Also in a slot whose memory the refreshes of an earlier request have replaced."""
    given = model.adapt([requests[0].prompt], MemorySettings(0.5, refresh="block", start="present"))
    begun = []
    enter = SlotMemory.enter

    def record(self, slots, *arguments):
        enter(self, slots, *arguments)
        for slot in slots:
            begun.append(fast_weight_tree.leaves(fast_weight_tree.select(self._reader.fast, [slot], self._slots)))

    monkeypatch.setattr(SlotMemory, "enter", record)
    served = serve(model, requests, replace(SETTINGS["steps"], block_size=2), 2, given)
    assert served.memory_steps > 0 and len(begun) > 2, "slots are used again"
    for leaves in begun:
        assert all(map(torch.equal, leaves, fast_weight_tree.leaves(given.fast)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_serves_what_it_generates(trained, layout):
    read = json.loads((trained / f"{layout}.json").read_text())
    expected = read["block-causal"]
    assert read["served"] == [*expected, expected[0]]


@pytest.mark.parametrize("kind", fast_weights.FAST_WEIGHT_TYPES)
def test_sets_are_replaced_in_place(kind):
    """Also with experts, whose number is the slower index of the leading dimension; other sets stay."""
    linears = [AdaptedLinear("0", "q", 4, 6, False, 0), AdaptedLinear("0", "gate", 4, 6, False, 1, experts=3)]

    def draw(seed, sets):
        fast = fast_weights.draw(kind, linears, 2, 4.0, torch.arange(sets) + 100 * seed)
        for number, x in enumerate(fast_weight_tree.leaves(fast)):
            x.copy_(torch.arange(x.numel()).view_as(x) + 1000.0 * seed + 100 * number)
        return fast

    fast, new = draw(1, 4), draw(5, 2)
    before, tensors = [x.clone() for x in fast_weight_tree.leaves(fast)], fast_weight_tree.leaves(fast)
    fast_weight_tree.replace_sets(fast, [3, 1], 4, new)
    for old, x, y in zip(before, tensors, fast_weight_tree.leaves(new), strict=True):
        for expert in range(len(x) // 4):
            rows = [old[4 * expert], y[2 * expert + 1], old[4 * expert + 2], y[2 * expert]]
            assert torch.equal(x[4 * expert : 4 * expert + 4], torch.stack(rows))
    assert {len(x) for x in tensors} == {4, 12}
