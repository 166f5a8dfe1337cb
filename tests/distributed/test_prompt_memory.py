"""Memory of prompts in pieces, refreshed before blocks, and in files."""

import json
import os
import shutil
from dataclasses import replace
from itertools import chain

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memdlm_dist.checkpoint.fingerprint import fingerprint
from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings, PromptIdentity, identify, pieces
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.inference.sampler import finished
from memdlm_dist.inference.serving import Request, serve
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method.fast_weight_tree import leaves, map_leaves
from tests.workers.reading import BOLD, LAYOUTS, MEMORIES, PLAIN, PROMPTS, arguments_of


@pytest.fixture(scope="module")
def model(trained):
    trained_model = TrainedModel(parse_config.parse([*arguments_of(trained), *BOLD]))
    yield trained_model
    trained_model.close()


@pytest.fixture
def prompts(model):
    return model.tokenizer.encode_plain(PROMPTS)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def equal(one, other):
    return all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(other), strict=True))


def test_pieces():
    assert pieces([], 4) == [[]] and pieces([1, 2, 3], None) == pieces([1, 2, 3], 3) == [[1, 2, 3]]
    for length in range(1, 40):
        for chunk in range(2, 12):
            parts = pieces(list(range(length)), chunk)
            sizes = [len(part) for part in parts]
            assert list(chain(*parts)) == list(range(length)) and len(parts) == -(-length // chunk)
            assert max(sizes) <= chunk and max(sizes) - min(sizes) <= 1


def test_pieces_are_written_one_after_another(model, prompts):
    """One piece gives the same bits as no pieces; several are the inner loop on each, from where the last one ended."""
    longest = max(map(len, prompts))
    published = model.adapt(prompts)
    assert equal(model.adapt(prompts, MemorySettings(chunk=longest)).fast, published.fast)
    settings = MemorySettings(chunk=4)
    together = model.adapt(prompts, settings)
    assert together.steps == published.steps * -(-longest // 4) > published.steps
    for row, prompt in enumerate(prompts):
        fast = None
        for number, piece in enumerate(pieces(prompt, 4)):
            ids, step = torch.tensor([row]), torch.tensor([number])
            fast, _ = model._writer._adapt([piece], settings, ids, step, fast)
        for x, y in zip(leaves(together.fast), leaves(fast), strict=True):
            # The rounding of a batch, 4e-6 for whole prompts, grows from piece to piece at this inner rate.
            torch.testing.assert_close(x[row], y[0], rtol=0, atol=5e-5)


def test_other_pieces_have_other_masks(model, prompts):
    """The same text twice is masked at other positions the second time."""
    text = prompts[0]
    first, again = (model._writer.write([text], AS_PUBLISHED, [3], [number]).fast for number in (0, 1))
    assert equal(first, model.adapt([text], ids=[3]).fast) and not equal(first, again)


@pytest.mark.parametrize("start", ["fresh", "present"])
def test_a_refresh_reads_the_prompt_and_the_decided_blocks(model, prompts, start):
    """Compare with decoding block by block, with a new memory for each."""
    settings, prompt = MemorySettings(0.5, 6, "block", start), [*prompts[0], model.mask_id, 7]
    decoding = Decoding(3, stop_at_eos=False)
    row, fast = [*prompt, *[model.mask_id] * 8], None
    for number in range(3):
        masked = [i for i, token in enumerate(row) if token == model.mask_id]
        text = row[: max(len(prompt), masked[0])]
        adapted = model._writer.write([text], settings, [9], [number], fast)
        fast = adapted.fast if start == "present" else None
        begin = model.canvas([row], 0, [9])
        decoded = finished(model.denoise(begin, decoding, adapted.fast), begin)[0].tolist()
        for i in masked[:3]:
            row[i] = decoded[i]
    made = model.generate([prompt], 8, decoding, settings, [9])
    assert made.tokens_BL[0].tolist() == row
    # Tokens of this small model seldom depend on the memory: compare what the last block has read as well.
    start = model.canvas([prompt], 8, [9])
    decoder, memory = model.slots(decoding, 1, start.tokens_BL.shape[1], settings)
    decoder.load([0], start)
    memory.enter([0], [prompt], [9])
    decoder.run()
    assert equal(memory._reader.fast, adapted.fast) and not equal(made.fast, adapted.fast)
    once = model.adapt([prompt], replace(settings, refresh="none", start="fresh"), [9])
    assert equal(once.fast, made.fast) and memory.steps == made.memory_steps > 2 * once.steps


def test_caches_do_not_outlive_a_refresh(model, prompts, monkeypatch):
    """The first pass after a refresh reads the whole row, with whose old keys and values block-causal caches go on."""
    settings = MemorySettings(0.5, refresh="block")
    plain = Decoding(2, temperature=1.0, stop_at_eos=False, attention="block_causal")
    cached = replace(plain, cache="dual")
    read_all = []
    choose = ModelReader.choose

    def record(self, reading, *rest):
        read_all.append(reading.position_RT is None)
        return choose(self, reading, *rest)

    monkeypatch.setattr(ModelReader, "choose", record)
    prompt = prompts[0]
    assert len(prompt) % 2, "the first block has one open token"
    model.generate([prompt], 5, cached, AS_PUBLISHED)
    assert read_all == [True, False, False, False, False]
    read_all.clear()
    made = model.generate([prompt], 5, cached, settings)
    assert read_all == [True, True, False, True, False]
    assert made.responses == model.generate([prompt], 5, plain, settings).responses


def test_layouts_and_files_agree(trained, prompts, model):
    one, *others = (json.loads((trained / f"{name}.json").read_text()) for name in LAYOUTS)
    assert one["written"] == one["loaded"] and len({*map(tuple, one["written"])}) == 3
    for key in ("written", "loaded", *MEMORIES):
        assert all(other[key] == one[key] for other in others), key
    assert len({str(one[key]) for key in MEMORIES}) == 3
    with safe_open(trained / "one.safetensors", "pt") as file:
        header, names = file.metadata(), [*file.keys()]
        for layout in LAYOUTS:
            with safe_open(trained / f"{layout}.safetensors", "pt") as other:
                assert other.metadata() == header and [*other.keys()] == names, layout
                for name in names:
                    torch.testing.assert_close(other.get_tensor(name), file.get_tensor(name), rtol=0, atol=4e-6)
    identity = PromptIdentity(int(header["prompt_tokens"]), header["prompt"])
    assert identity == identify(prompts[0]) != identify(prompts[1])
    assert header["base"] == model.fingerprint()


def test_a_saved_memory_answers_like_its_prompt(model, prompts, tmp_path):
    path = tmp_path / "memory.safetensors"
    adapted = model.adapt(prompts[:1])
    model.save_memory(path, adapted)
    loaded = model.load_memory(path)
    assert equal(loaded.fast, adapted.fast) and loaded.prompts == adapted.prompts and loaded.steps == 0
    for memory in (AS_PUBLISHED, loaded):
        made = model.generate(prompts[:1], 6, PLAIN, memory)
        assert made.responses == model.generate(prompts[:1], 6, PLAIN, adapted).responses
        assert (made.memory_steps > 0) == (memory is AS_PUBLISHED)
    # Going on from it, on another text.
    going_on = model.load_memory(path, MemorySettings(refresh="block", start="present"))
    assert model.generate([[5, 6]], 6, PLAIN, going_on).memory_steps > 0
    assert equal(going_on.fast, adapted.fast), "a memory is not changed by those who read it"
    with pytest.raises(UserError, match=r"memory.safetensors exists; choose another file, or pass --overwrite"):
        model.save_memory(path, adapted)
    model.save_memory(path, adapted, overwrite=True)
    two = model.adapt(prompts[:2])
    with pytest.raises(UserError, match="holds one prompt's memory, not 2"):
        model.save_memory(tmp_path / "two", two)
    with pytest.raises(UserError, match="A refresh from fresh fast weights would drop the loaded memory"):
        model.load_memory(path, MemorySettings(refresh="block"))
    diverged = replace(adapted, fast=map_leaves(lambda x: x / 0, adapted.fast))
    with pytest.raises(UserError, match=r"not finite, so it is not saved; lower parametric_memory\.learning_rate"):
        model.save_memory(tmp_path / "diverged", diverged)
    assert not (tmp_path / "diverged").exists() and path.stat().st_mode & 0o777 == 0o666 & ~umask()
    with pytest.raises(UserError, match=r"3 rows cannot read the memory of 2 prompts; give that of one prompt, or"):
        model.generate(prompts[:3], 2, PLAIN, two)
    with pytest.raises(UserError, match="Requests can only share the memory of one prompt"):
        serve(model, [Request(prompts[0], 2, 0)], PLAIN, 2, two)
    with pytest.raises(UserError, match="its folder does not exist"):
        model.save_memory(tmp_path / "no/folder", adapted)


def test_files_that_do_not_fit_are_named(model, prompts, tmp_path, trained):
    path = tmp_path / "memory.safetensors"
    model.save_memory(path, model.adapt(prompts[:1]))
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def change(name, tensors=tensors, **changes):
        save_file(tensors, tmp_path / name, header | changes)
        return tmp_path / name

    name = next(iter(tensors))
    missing = {key: x for key, x in tensors.items() if key != name}
    (tmp_path / "short").write_bytes(path.read_bytes()[:-10])
    (tmp_path / "text").write_text("import os")
    save_file(tensors, tmp_path / "plain")
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    for file, sentence in {
        tmp_path / "absent": r"cannot be read \(.*No such file.*\); correct the path, or save it again\.$",
        tmp_path / "short": r"short cannot be read \(.*\); correct the path, or save it again\.$",
        tmp_path / "text": r"text cannot be read \(.*\); correct the path, or save it again\.$",
        tmp_path / "pickle": r"pickle cannot be read \(.*\); correct the path, or save it again\.$",
        tmp_path / "plain": r"plain is no memory of a prompt; name a file that --save-memory has written\.$",
        change("base", base="0"): r"base was written with other weights of the base; use the checkpoint with which",
        change(
            "kind", adapter="full" * 99
        ): r"kind has fast weights with adapter = (full){12}fu, but this model has lora",
        change("damaged", prompt_tokens="9" * 5000): r"damaged is no memory of a prompt",
        change("nan", tensors | {name: tensors[name] / 0}): r"nan is damaged \(it has numbers that are not finite, or",
        change("whole", tensors | {name: tensors[name].int()}): r"whole is damaged \(it has numbers",
        change("missing", missing): rf"missing has no tensor {name}, but this model has a tensor of shape",
        change(
            "shape", tensors | {name: tensors[name][:, :1]}
        ): rf"a tensor of shape \S+ as {name}, but this model has",
    }.items():
        with pytest.raises(UserError, match=sentence):
            model.load_memory(file)
    other = shutil.copytree(trained / "run", tmp_path / "run")
    arguments = [str(other) if x == str(trained / "run") else x for x in arguments_of(trained)]
    wider = TrainedModel(
        parse_config.parse([*arguments, "--parametric_memory.rank", "3"]), str(trained / "run/checkpoint")
    )
    with pytest.raises(UserError, match="alpha / rank"):
        wider.load_memory(path)


def test_a_fingerprint_names_weights_by_name_place_and_bits(model):
    state = {"a": torch.arange(12.0).view(3, 4), "b": torch.zeros(2)}
    first = fingerprint(state, 1)
    assert first == fingerprint(dict(reversed(state.items())), 1)
    changed = [
        state | {"a": state["a"].flip(0)}, state | {"a": state["a"].flip(1)}, state | {"a": state["a"].view(4, 3)},
        state | {"a": state["a"].bfloat16()}, state | {"b": torch.tensor([0.0, -0.0])},
        {"c": state["a"], "b": state["b"]},
        state | {"b": torch.zeros(2, dtype=torch.int32)}, state | {"a": state["a"].T.reshape(3, 4)},
    ]  # fmt: skip
    square = torch.arange(25.0).view(5, 5)
    swapped = square.clone()
    swapped[0, 4], swapped[1, 1] = square[1, 1], square[0, 4]
    changed += [state | {"a": square}, state | {"a": square.T.contiguous()}, state | {"a": swapped}]
    assert len({first, *(fingerprint(x, 1) for x in changed)}) == 1 + len(changed)
    adapter = {"q.lora_A": torch.ones(2, 4), "q.lora_B": torch.zeros(3, 2)}
    assert fingerprint(state | adapter, 1) == first, "an adapter that adds nothing"
    adapter["q.lora_B"][1, 1] = 1
    assert fingerprint(state | adapter, 1) != first
    before = model.fingerprint()
    with torch.no_grad():
        weight = model.model.get_parameter("norm.weight")
        weight[0] += 1e-6
        assert model.fingerprint() != before
        weight[0] -= 1e-6


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"anchor_ratio": 0.0}, "The anchor ratio must be above 0 and at most 1, but is 0.0"),
        ({"chunk": 1}, "The memory's pieces must have at least 2 tokens, but have 1"),
        ({"refresh": "always"}, "The memory's refresh must be one of none, block, not always"),
        ({"start": "old"}, "The memory's start must be one of fresh, present, not old"),
        ({"start": "present"}, "Starting from the present fast weights needs a refresh"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        MemorySettings(**settings)
