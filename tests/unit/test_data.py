"""Data pipeline: corpus files to shards to micro-batches."""

import gzip
import json
import lzma
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from streaming.base.batching import generate_work

from memdlm_dist.config import parse_config
from memdlm_dist.config.job_config import Data
from memdlm_dist.data import corpus, packing, sequences, shards
from memdlm_dist.data.dataset import TokenDataset, open_dataset
from memdlm_dist.data.loader import EpochLoader
from memdlm_dist.data.packing import BestFit, Concatenation
from memdlm_dist.data.preparation import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.row_shape import check_cards
from memdlm_dist.data.sequences import Document, Fields, fine_tuning_document, padded
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.training.backbone import get_shard_requirements

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def request(tmp_path, *inputs, **changes):
    settings = {"output": tmp_path / "out", "seq_len": 32, "train_tokenizer": 300, "held_out": 0.0}
    return PrepareConfig(inputs=inputs, **(settings | changes))


def open_shards(folder, check_hash="xxh64"):
    return TokenDataset(local=str(folder), batch_size=1, shuffle=False, check_hash=check_hash)


def read(folder):
    dataset = open_shards(folder)
    return [dataset[i] for i in range(dataset.size)]


def decode(tokenizer, ids):
    return tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_concatenation_loses_only_the_tail():
    packer = Concatenation(8)
    documents = [[*range(1, 6), 0], [*range(10, 31), 0], [0], [40, 0]]
    packed = [s for d in documents for s in packer.add(np.array(d, dtype=np.uint32))]
    stream = [t for d in documents for t in d]
    assert np.concatenate([s.tokens_L for s in packed]).tolist() == stream[: len(packed) * 8]
    assert packer.tail == len(stream) % 8 and all(s.maskable_L.all() and not s.documents for s in packed)


def test_concatenation_is_that_of_lists():
    rng = np.random.default_rng(0)
    packer, buffer, expected, packed = Concatenation(7), [], [], []
    for size in [*rng.integers(1, 12, 200).tolist(), 100, 7, 14, 1]:
        document = rng.integers(0, 2**32, size, dtype=np.uint32)
        packed += [s.tokens_L.tolist() for s in packer.add(document)]
        buffer += document.tolist()
        while len(buffer) >= 7:
            expected.append(buffer[:7])
            del buffer[:7]
        assert packed == expected and packer.tail == len(buffer)


def test_best_fit_loses_nothing_and_leaves_the_least_room():
    sizes = [5, 4, 3, 3, 9, 8, 1]
    best_fit = BestFit(8, eos_id=0)
    starts = np.cumsum([0, *sizes]) + 1
    documents = [
        Document(np.arange(start, start + size, dtype=np.uint32), np.full(size, i % 2 == 0))
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    packed = [s for d in documents for s in best_fit.add(d)] + list(best_fit.finish())
    # Rows: 5 + 3; the first 8 of the 9; 4 + 3 + the last token of the 9; 8; and the remaining 1.
    assert [s.documents for s in packed] == [(5, 3), (8,), (4, 3, 1), (8,), (1,)]
    packed_tokens = [t for s in packed for t in s.tokens_L[: sum(s.documents)].tolist()]
    assert sorted(packed_tokens) == [t for d in documents for t in d.tokens]
    of_token = {t: flag for d in documents for t, flag in zip(d.tokens, d.maskable, strict=True)}
    for s in packed:
        size = sum(s.documents)
        assert s.maskable_L[:size].tolist() == [of_token[t] for t in s.tokens_L[:size].tolist()]
        assert not s.maskable_L[size:].any() and not s.tokens_L[size:].any()
    assert (best_fit.rows, best_fit.tokens, best_fit.documents, best_fit.most_documents) == (5, 33, 8, 3)


def test_best_fit_fills_nearly_everything_and_waits_with_a_bounded_number_of_rows(monkeypatch):
    sizes = np.random.default_rng(0).geometric(1 / 60, 3000).clip(max=256).tolist()
    best_fit = BestFit(256, eos_id=0)
    packed = [s for size in sizes for s in best_fit.add(Document(np.ones(size, np.uint32), np.ones(size, np.bool_)))]
    packed += best_fit.finish()
    assert sum(sum(s.documents) for s in packed) == sum(sizes) and best_fit.rows == len(packed)
    assert best_fit.tokens > 0.99 * 256 * best_fit.rows
    monkeypatch.setattr(packing, "_OPEN_TOKENS", 0)
    bounded = BestFit(256, eos_id=0)
    before_finish = sum(
        1 for size in sizes for _ in bounded.add(Document(np.ones(size, np.uint32), np.ones(size, np.bool_)))
    )
    assert len(list(bounded.finish())) <= 64 < before_finish


def test_padding_learns_the_response_and_its_end():
    parts = [(np.array([1, 2, 3], np.uint32), False), (np.array([4, 5], np.uint32), True)]
    document, too_long = fine_tuning_document(parts, 8, eos_id=0, overlong="drop")
    assert document.tokens.tolist() == [1, 2, 3, 4, 5, 0] and not too_long
    assert document.maskable.tolist() == [False] * 3 + [True] * 3
    sequence = padded(document, 8, eos_id=0)
    assert sequence.tokens_L.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert sequence.maskable_L.tolist() == [False] * 3 + [True] * 5
    assert fine_tuning_document(parts, 5, 0, "drop") == (None, True)
    cut, too_long = fine_tuning_document(parts, 4, 0, "truncate")
    assert cut.tokens.tolist() == [1, 2, 3, 4] and cut.maskable.tolist() == [False] * 3 + [True] and too_long
    assert fine_tuning_document(parts, 3, 0, "truncate") == (None, True), "no response is left to learn from"


@pytest.mark.parametrize("overlong", ["drop", "truncate", "clip-response"])
@pytest.mark.parametrize("every_turn", [True, False])
def test_fine_tuning_documents_are_those_of_lists(overlong, every_turn):
    def of_lists(encoded, length):
        tokens, maskable = [], []
        for number, (ids, is_response) in enumerate(encoded, start=1):
            ids = [*ids, 99] if is_response and (every_turn or number == len(encoded)) else ids
            tokens += ids
            maskable += [is_response] * len(ids)
        too_long = len(tokens) > length
        if too_long and (overlong == "drop" or not any(maskable[:length])):
            return None, True
        if too_long and overlong == "clip-response":
            length -= maskable[:length][::-1].index(True)
        return (tokens[:length], maskable[:length]), too_long

    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(300):
        encoded = [
            (rng.integers(0, 99, rng.integers(0, 6)).tolist(), bool(rng.integers(2))) for _ in range(rng.integers(1, 5))
        ]
        arrays = [(np.array(ids, dtype=np.uint32), is_response) for ids, is_response in encoded]
        document, too_long = fine_tuning_document(arrays, 9, 99, overlong, every_turn)
        expected, expected_too_long = of_lists(encoded, 9)
        assert too_long == expected_too_long and (document is None) == (expected is None)
        outcomes.add((too_long, document is None))
        if document is None:
            continue
        assert (document.tokens.tolist(), document.maskable.tolist()) == expected
        row = padded(document, 12, 99)
        n_padding = 12 - len(expected[0])
        assert row.tokens_L.tolist() == expected[0] + [99] * n_padding and row.content == len(expected[0])
        assert row.maskable_L.tolist() == expected[1] + [True] * n_padding
    assert len(outcomes) == (2 if overlong == "drop" else 3)


def test_packed_rows_keep_their_documents(tmp_path):
    """Documents and fine-tuning rows in one stream, and that stream next to one without documents."""
    rows = [{"text": TEXT[: 20 * i]} for i in range(1, 12)] + [{"prompt": "2+2=", "response": "4"}] * 3
    prepared = request(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows), pack_documents=True)
    summary = prepare.prepare(prepared)
    packed = summary.packing["train"]
    assert packed.documents >= 14 and packed.most_documents > 1 and packed.efficiency > 0.9
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["packing"]["train"]["documents"] >= 14
    card = shards.read_card(str(tmp_path / "out" / "train"))
    assert card.documents and card.most_documents == packed.most_documents
    dataset = TokenDataset(
        local=str(tmp_path / "out" / "train"), batch_size=1, shuffle=False, check_hash="xxh64", documents=True
    )
    tokenizer = DiffusionTokenizer(str(tmp_path / "out/tokenizer"))
    texts = []
    for i in range(dataset.size):
        tokens, labels, numbers = (dataset[i][key] for key in ("tokens", "labels", "documents"))
        assert (labels[numbers == PADDING] == IGNORE_INDEX).all() and (
            tokens[numbers == PADDING] == card.eos_token_id
        ).all()
        assert (numbers[:-1] <= numbers[1:])[numbers[1:] != PADDING].all()
        for number in range(int(numbers.max()) + 1):
            ids = tokens[numbers == number]
            masked = labels[numbers == number] != IGNORE_INDEX
            texts.append(decode(tokenizer, ids[masked].tolist()))
    whole = TokenDataset(
        local=str(tmp_path / "out" / "train"), batch_size=1, shuffle=False, check_hash="", documents=True,
        mask_prompt=True,
    )  # fmt: skip
    for sample in whole:
        maskable, padding = sample["labels"] != IGNORE_INDEX, sample["documents"] == PADDING
        assert torch.equal(maskable, ~padding) and torch.equal(sample["labels"][maskable], sample["tokens"][maskable])
    assert sorted(t for t in texts if t == "4<|endoftext|>") == ["4<|endoftext|>"] * 3
    assert sum(t.count("<|endoftext|>") for t in texts) == 14
    assert {t.removesuffix("<|endoftext|>") for t in texts} >= {TEXT[:20], TEXT[:40]}

    config = parse_config.parse([
        "--job.config_file", "train_configs/debug.toml", "--training.seq_len", "32",
        "--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_method", "ring",
    ])  # fmt: skip
    with pytest.raises(UserError, match="hold packed documents, which ring attention cannot keep apart"):
        check_cards([str(tmp_path / "out" / "train")], get_shard_requirements(config, tokenizer.mask_id))

    plain = request(tmp_path, write_jsonl(tmp_path / "b.jsonl", [{"text": TEXT}]), output=tmp_path / "plain")
    prepare.prepare(plain)
    config.parallelism.context_parallel_method = "ulysses"
    run = get_shard_requirements(config, card.mask_token_id)
    both = [str(tmp_path / name / "train") for name in ("plain", "out")]
    assert [check_cards(x, run).most_documents for x in (both[:1], both)] == [0, packed.most_documents]
    of_format_1 = Path(both[1], "memdlm.json")
    of_format_1.write_text(
        json.dumps({k: v for k, v in asdict(card).items() if k not in ("most_documents", "pad_multiple", "format")})
    )
    assert check_cards(both, run).most_documents is None
    stream = TokenDataset(
        local=str(tmp_path / "plain" / "train"), batch_size=1, shuffle=False, check_hash="xxh64", documents=True
    )
    assert not shards.read_card(str(tmp_path / "plain" / "train")).documents and not stream[0]["documents"].any()


@pytest.mark.parametrize(
    "row, form, prompt, response",
    [
        ({"prompt": "2+2=", "response": "4"}, "prompt_response", "2+2=", "4"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", "Add.\n\n1 2\n\n", "3"),
        ({"instruction": "Add.", "input": None, "output": "3"}, "alpaca", "Add.\n\n", "3"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            "messages",
            "user: hi\n\nassistant: ",
            "yo",
        ),
        (
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
            ]},
            "messages",
            "user: hi\n\nassistant: ",
            "yo",
        ),
        (
            {"id": "1", "system": "Be brief.", "conversations": [
                {"from": "human", "value": "hi"}, {"from": "observation", "value": "3"}, {"from": "gpt", "value": "yo"},
            ]},
            "sharegpt",
            "system: Be brief.\n\nuser: hi\n\ntool: 3\n\nassistant: ",
            "yo",
        ),
        (
            {"system": "Be long.", "conversations": [
                {"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"},
                {"from": "function_call", "value": "add(1, 2)"}, {"from": "observation", "value": "3"},
            ]},
            "sharegpt",
            "system: Be brief.\n\nuser: hi\n\nassistant: tool: 3\n\n",
            "add(1, 2)",
        ),
        (
            {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            "sharegpt",
            "user: hi\n\nassistant: ",
            "yo",
        ),
    ],
)  # fmt: skip
def test_fine_tuning_rows(row, form, prompt, response):
    assert sequences.detect_format(row, Fields()) == form
    segments = sequences.segments(row, form, Fields())
    assert "".join(text for text, is_response in segments if not is_response) == prompt
    assert [text for text, is_response in segments if is_response] == [response]


@pytest.mark.parametrize(
    "row, form, message",
    [
        ({"instruction": "x"}, "alpaca", "'output' is missing"),
        ({"prompt": 3, "response": "x"}, "prompt_response", "'prompt' is int, not text"),
        ({"messages": "hi"}, "messages", "not a non-empty list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "no response"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            r"content\[0\] has the type 'image_url'; only 'text' is supported",
        ),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages", r"content\[0\] is str, not an object"),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": None, "tool_calls": [1]},
                ]
            },
            "messages",
            r"messages\[1\] has tool_calls \(tool calls are not supported\)",
        ),
        (
            {"messages": [{"role": "assistant", "content": "yo", "tool_calls": None, "function_call": {"name": "f"}}]},
            "messages",
            r"messages\[0\] has function_call \(tool calls are not supported\)",
        ),
        ({"conversations": []}, "sharegpt", "'conversations' is not a non-empty list"),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "sharegpt",
            "the unknown role 'narrator', not one of h",
        ),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "'value' is missing"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "system": 1}, "sharegpt", "'system' is int, not text"),
    ],
)
def test_bad_rows_name_the_field(row, form, message):
    with pytest.raises(sequences.BadRow, match=message):
        sequences.segments(row, form, Fields())
    with pytest.raises(sequences.BadRow, match=message):
        sequences.conversation(row, form, Fields())


def test_every_container_gives_the_same_shards(tmp_path):
    rows = [{"text": f"{i} {TEXT}"} for i in range(30)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    inputs = {
        "plain": write_jsonl(tmp_path / "a.jsonl", rows),
        "gzip": write_jsonl(tmp_path / "b.jsonl.gz", rows, gzip.open),
        "zstandard": write_jsonl(tmp_path / "e.jsonl.zst", rows, zstandard.open),
        "xz": write_jsonl(tmp_path / "f.jsonl.xz", rows, lzma.open),
        "url": "file://" + write_jsonl(tmp_path / "c.jsonl", rows),
        "parquet": str(tmp_path / "a.parquet"),
        "pattern": str(tmp_path / "a.jsonl*"),
        "array": str(tmp_path / "d.json"),
    }
    tokens = {}
    for name, url in inputs.items():
        prepare.prepare(request(tmp_path, url, output=tmp_path / name))
        tokens[name] = torch.stack([sample["tokens"] for sample in read(tmp_path / name / "train")])
    assert all(torch.equal(t, tokens["plain"]) for t in tokens.values())


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet"])
def test_files_that_are_not_what_they_say(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither compressed nor Parquet, but long enough to look at" * 4)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        prepare.prepare(request(tmp_path, str(tmp_path / name)))


def test_round_trip_and_summary(tmp_path):
    rows = [
        {"prompt": "question one? ", "response": "answer one"},
        "{not json",
        {"prompt": "no response"},
        {"prompt": "long " * 100, "response": "never seen"},
        ["a", "list"],
        {"prompt": "question two? ", "response": "answer two"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    reports = []
    summary = prepare.prepare(request(tmp_path, path), report=reports.append)
    assert (summary.rows, summary.bad_rows, summary.overlong_dropped) == (6, 3, 1)
    assert summary.sequences == {"train": 2, "heldout": 0}
    assert len(reports) == 3
    assert all(any(f"{path}:{line}:" in text for text in reports) for line in (2, 3, 5))
    assert json.loads((tmp_path / "out/summary.json").read_text())["bad_rows"] == 3

    tokenizer = DiffusionTokenizer(str(tmp_path / "out/tokenizer"))
    dataset = open_shards(tmp_path / "out/train")
    for i, (prompt, answer) in enumerate([("question one? ", "answer one"), ("question two? ", "answer two")]):
        sample = dataset[i]
        assert sample["sample_id"] == i and sample["tokens"].shape == (32,)
        maskable = sample["labels"] != IGNORE_INDEX
        assert decode(tokenizer, sample["tokens"][~maskable].tolist()) == prompt
        text = decode(tokenizer, sample["tokens"][maskable].tolist())
        assert text == answer + "<|endoftext|>" * text.count("<|endoftext|>") and "<|endoftext|>" in text
        assert torch.equal(sample["labels"][maskable], sample["tokens"][maskable])


def test_held_out_rows_are_disjoint_and_stable(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(200)])
    summaries = [prepare.prepare(request(tmp_path, path, held_out=0.2, output=tmp_path / n)) for n in ("x", "y")]
    assert summaries[0] == summaries[1]
    parts = {part: {tuple(s["tokens"].tolist()) for s in read(tmp_path / "x" / part)} for part in prepare.SPLITS}
    assert not parts["train"] & parts["heldout"] and 20 <= len(parts["heldout"]) <= 60


def test_builtin_corpus_is_real_text(tmp_path):
    summary = prepare.prepare(request(tmp_path, held_out=0.2, limit=40, seq_len=64))
    assert summary.rows == 40 and min(summary.sequences.values()) > 10
    assert len(corpus.builtin_sources()) > 400


def test_adopted_tokenizers_get_the_tokens_they_lack(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 4)
    prepare.prepare(request(tmp_path, path))
    tokenizer = tmp_path / "out/tokenizer"
    (tokenizer / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no mask_token; give --mask-token NAME"):
        prepare.prepare(request(tmp_path, path, output=tmp_path / "b", train_tokenizer=None, tokenizer=str(tokenizer)))
    settings = {
        "train_tokenizer": None,
        "tokenizer": str(tokenizer),
        "mask_token": "<new>",
        "eos_token": "<|endoftext|>",
    }
    prepare.prepare(request(tmp_path, path, output=tmp_path / "c", **settings))
    old, new = (json.loads((f / "tokenizer.json").read_text()) for f in (tokenizer, tmp_path / "c/tokenizer"))
    card = shards.read_card(str(tmp_path / "c/train"))
    assert card.mask_token_id == len(old["model"]["vocab"]) and card.eos_token_id == 0
    assert new["model"]["vocab"] == old["model"]["vocab"]


def test_nothing_prepared_is_overwritten_unasked(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 4)
    prepare.prepare(request(tmp_path, path))
    with pytest.raises(UserError, match="is not empty; choose another --output or pass --overwrite"):
        prepare.prepare(request(tmp_path, path))
    prepare.prepare(request(tmp_path, path, overwrite=True))
    (tmp_path / "out/train/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.txt, which no preparation wrote"):
        prepare.prepare(request(tmp_path, path, overwrite=True))
    assert (tmp_path / "out/train/index.json").is_file()


def test_a_preparation_that_fails_leaves_the_earlier_one(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 4)
    prepare.prepare(request(tmp_path, path))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": TEXT + " other"}] * 4 + ["{"])
    with pytest.raises(UserError, match=r"bad\.jsonl:5: not valid JSON"):
        prepare.prepare(request(tmp_path, bad, overwrite=True, strict=True))
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}


def make_loader(folder, **changes):
    settings = {"batch_size": 4, "shuffle": True, "num_canonical_nodes": 1, "check_hash": "xxh64"}
    dataset = TokenDataset(local=str(folder), **(settings | changes))
    return EpochLoader(dataset, dataset.batch_size, dp_size=1, global_batch_size=dataset.batch_size)


def ids(loader, batches):
    iterator = iter(loader)
    return [tuple(next(iterator).sample_ids_B.tolist()) for _ in range(batches)]


def test_loader_goes_through_epochs_and_resumes_exactly(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(22)])
    prepare.prepare(request(tmp_path, path))
    folder = tmp_path / "out/train"
    order = ids(make_loader(folder), 12)  # 22 samples: 5 full batches of 4 per epoch
    assert all(len(set(sum(order[e : e + 5], ()))) == 20 for e in (0, 5))
    assert order[:5] != order[5:10], "each epoch has its own shuffle"
    for done in (3, 5, 7):  # within the first epoch, at its end, within the second
        loader = make_loader(folder)
        iterator = iter(loader)
        for _ in range(done):
            loader.position = next(iterator).position
        next(iterator)  # prefetched and discarded
        state = loader.state_dict()
        resumed = make_loader(folder)
        resumed.load_state_dict(state)
        assert ids(resumed, 4) == order[done : done + 4], done


@pytest.fixture(scope="module")
def rows_101(tmp_path_factory):
    """Return the folder of 101 rows."""
    folder = tmp_path_factory.mktemp("rows_101")
    path = write_jsonl(folder / "rows.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(101)])
    prepare.prepare(request(folder, path))
    return folder / "out/train"


def open_groups(folder, n, canonical=1, **options):
    settings = {"batch_size": n, "num_canonical_nodes": canonical, "shuffle_block_size": 1 << 18, "check_hash": ""}
    return TokenDataset(local=str(folder), group_size=n, shuffle=True, **(settings | options))


def deal(dataset, nodes=1, ranks=1, workers=1, size=1, first=0, epoch=0):
    """Return the ids of the micro-batches of all ranks as torch's loaders read them, `[T, ranks, size]`."""
    dataset.batch_size = size
    world = SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers)
    dealt = generate_work(dataset.batching_method, dataset, world, epoch, first)
    return dealt.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks, size)  # worker t % workers, in turn


def groups_by_hand(folder, n, canonical=1, epoch=0, **options):
    """Return streaming's order on one rank in groups of one canonical node's consecutive samples, `[groups, n]`.

    streaming reads one sample of each canonical node in turn.
    """
    dataset = open_groups(folder, 1, canonical, **options)
    assert dataset.batching_method == "random", "streaming's own"
    order = deal(dataset, epoch=epoch).reshape(-1, canonical).T[:, : dataset.epoch_size // canonical // n * n]
    return order.reshape(canonical, -1, n).transpose(1, 0, 2).reshape(-1, n)


@pytest.mark.parametrize("n, canonical, size", [*product((2, 4), (1, 2, 4), (96, 101)), (1, 4, 101)])
def test_every_layout_deals_the_same_groups(rows_101, n, canonical, size):
    def steps(*layout, **position):
        """Return the set of groups of each optimizer step of 24 rows."""
        ids = deal(dataset, *layout, **position).reshape(-1, n)
        complete = (size - position.get("first", 0)) // 24
        return [frozenset(map(tuple, step)) for step in ids[: complete * 24 // n].reshape(complete, -1, n).tolist()]

    dataset = open_groups(rows_101, n, canonical, epoch_size=size)
    reference = steps(1, 1, 1, n)
    assert len(frozenset.union(*reference)) == 4 * 24 // n and -1 not in np.array([[*step] for step in reference])
    # nodes, ranks per node, workers per rank, groups per micro-batch
    for nodes, ranks, workers, groups in [*product((1, 2, 4), (1, 3), (1, 2), (1, 2)), (2, 1, 3, 3), (1, 6, 1, 1)]:
        if 24 % (nodes * ranks * groups * n) == 0:
            layout = nodes, ranks, workers, groups * n
            assert steps(*layout) == reference, layout
            assert steps(*layout, first=48) == reference[2:], layout
    assert steps(1, 1, 1, n, epoch=1) != reference
    dataset.initial_physical_nodes = 2  # started on 2 nodes, resumed on 3, which divide neither 2 nor 4 canonical nodes
    assert steps(3, 1, 2, 2 * n, first=24) == reference[1:]

    dataset.initial_physical_nodes = None
    filler = deal(dataset, 1, 1, 9, 2 * n).reshape(-1, n) == -1
    assert filler.any() and np.array_equal(filler.all(1), filler.any(1))
    assert (~filler).sum() == n * canonical * -(-(size // n) // canonical), "all groups, and filler at the end"
    if size == 96 or n == 1 or canonical == 1:  # else canonical nodes end inside a group
        expected = groups_by_hand(rows_101, n, canonical, epoch_size=size)[: 96 // n]
        assert reference == [frozenset(map(tuple, step)) for step in expected.reshape(4, -1, n).tolist()]
        if canonical > 1:
            by_node = deal(dataset, 2, 1, 2, n)[: 48 // n]
            for node in (0, 1):
                own = expected.reshape(-1, canonical, n)[:, node::2]
                assert set(by_node[:, node].flat) == set(own.flat), "a node reads from its own canonical nodes"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_groups_whole(rows_101, workers):
    def open_loader(samples=0, size=8, global_batch_size=24):
        dataset = open_groups(rows_101, 4, batch_size=size)
        loader = EpochLoader(dataset, size, dp_size=1, global_batch_size=global_batch_size, num_workers=workers)
        loader.load_state_dict({"samples": samples})
        return loader

    epochs = [groups_by_hand(rows_101, 4, epoch=epoch)[:24].reshape(12, 8) for epoch in (0, 1)]
    expected = list(map(tuple, np.concatenate(epochs).tolist()))
    assert ids(open_loader(), 24) == expected, "the incomplete last global batch is dropped"
    assert ids(open_loader(48), 12) == expected[6:18]
    if workers == 0:
        changed = open_loader(30, size=4, global_batch_size=16)  # after an accepted change from 10 rows to 16
        assert sum(ids(changed, 16), ()) == sum(expected[4:12], ()), "goes on with the next whole group"


def config_with(tmp_path, **data):
    return Data(cache_folder=str(tmp_path / "cache"), **data)


@pytest.mark.parametrize("scheme", ["file", "local"], ids=["streaming's own way", "through fsspec"])
def test_streams_at_a_url_are_cached_and_checked(tmp_path, scheme):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(8)])
    prepare.prepare(request(tmp_path, path))
    remote = tmp_path / "out/train"
    url = f"{scheme}://{remote}"
    dataset = open_dataset(config_with(tmp_path), [url], [], batch_size=1, shuffle=False)
    tokens = [dataset[i]["tokens"] for i in range(8)]
    assert all(torch.equal(a, b["tokens"]) for a, b in zip(tokens, read(remote), strict=True))
    assert len(list((tmp_path / "cache").rglob("*.mds"))) == 1
    assert shards.read_card(url).sequences == 8

    shard = remote / "000000-0000/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.write_bytes(content)
    fresh = config_with(tmp_path / "again")
    with pytest.raises(UserError, match=r"shard\.00000\.mds is corrupt: its xxh64 checksum is wrong"):
        open_dataset(fresh, [url], [], batch_size=1, shuffle=False)[0]
    with pytest.raises(UserError, match=r"s4://b/train cannot be opened \(Protocol not known: s4\)"):
        open_dataset(fresh, ["s4://b/train"], [], batch_size=1)


def test_mixing_streams_by_proportion(tmp_path):
    folders = []
    for name, n in (("a", 40), ("b", 40)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "response": "x"} for i in range(n)])
        prepare.prepare(request(tmp_path, path, output=tmp_path / name))
        folders.append(str(tmp_path / name / "train"))
    dataset = open_dataset(
        config_with(tmp_path), folders, [3.0, 1.0], batch_size=4, shuffle=True, num_canonical_nodes=1
    )
    loader = EpochLoader(dataset, 4, dp_size=1, global_batch_size=4)
    seen = np.array(sum(ids(loader, 20), ()))
    assert (seen < 40).sum() == 60 and (seen >= 40).sum() == 20
