"""A preparation in units gives the same bytes in any order of work, however often it was interrupted."""

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from memdlm_dist.data import shards
from memdlm_dist.data.preparation import deduplication, prepare, tokenizer_sample, units
from memdlm_dist.data.preparation.jobs import Job
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.work_folder import FOLDER, WorkFolder
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime import writer
from memdlm_dist.runtime.storage import Storage
from tests.unit.test_preparation import jsonl, samples, tree

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "tests/assets/debug/tokenizer")
WORDS = [
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
]  # fmt: skip
UNIT = 1100
BAD = ["not JSON", {"other": 1}, {"text": 5}]


@pytest.fixture(autouse=True)
def quiet(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the tests fork


def documents(seed, count):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size)) for size in generator.integers(3, 40, count)]


@pytest.fixture(scope="module")
def corpus_files(tmp_path_factory):
    """Return a mixed corpus: JSONL with bad rows, a compressed file, Parquet, and small files."""
    folder = tmp_path_factory.mktemp("corpus")
    first, second, third = documents(0, 24), documents(1, 24), documents(2, 12)
    repeated = [first[3], first[20]]
    rows = [{"text": text} for text in [*first[:12], *repeated[:1], *first[12:]]]
    plain = jsonl(folder / "a.jsonl", [*rows[:5], *BAD, *rows[5:], BAD[0]])
    lines = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate([*second, *repeated, second[0]]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(f"{lines}bad\n".encode(), mtime=0))
    table = pyarrow.table({"text": [*third, second[5], third[0], None]})
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=5)
    small = [jsonl(folder / f"d{i}.jsonl", [{"text": text} for text in documents(i, 2)]) for i in range(3, 7)]
    return (plain, str(folder / "b.jsonl.gz"), str(folder / "c.parquet"), *small)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Return fine-tuning rows of several lengths; all rows of the second unit have the full length."""
    folder = tmp_path_factory.mktemp("conversations")
    texts = documents(9, 60)
    rows = [{"prompt": text[:20], "response": text[: 10 + 4 * i]} for i, text in enumerate(texts[:30])]
    rows += [{"prompt": "p", "response": " ".join(WORDS[:10]) + " a" * (i % 4)} for i in range(10)]
    return (jsonl(folder / "a.jsonl", rows[:30]), jsonl(folder / "b.jsonl", rows[30:]))


KINDS = {
    "plain": {},
    "packed": {"pack_documents": True},
    "trained": {"tokenizer": None, "train_tokenizer": 300, "tokenizer_sample": 4000},
    "deduplicated": {"deduplicate": True},
    "fine-tuning": {"pad_multiple": 8, "seq_len": 48},
    "limited": {"limit": 50},
}


def configured(output, inputs, **changes):
    settings = {"seq_len": 32, "tokenizer": TOKENIZER, "held_out": 0.2, "unit_size": UNIT, "workers": 1}
    return PrepareConfig(output=output, inputs=tuple(inputs), **(settings | changes))


def run(output, inputs, report=lambda _: None, **changes):
    return prepare.prepare(configured(output, inputs, **changes), report)


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def folders(output):
    return {path.name for path in output.iterdir()}


DONE = {"train", "heldout", "tokenizer", "summary.json"}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory, corpus_files, conversations):
    """Prepare the corpus in one go; return (inputs, options, digests of the output, number of events)."""
    output = tmp_path_factory.mktemp("whole") / "out"
    inputs = conversations if request.param == "fine-tuning" else corpus_files
    options = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        events = ending_at(patch, -1, None)
        run(output, inputs, **options)
    assert folders(output) == DONE
    return inputs, options, digests(output), next(events)


def ending_at(monkeypatch, event, end):
    """Call `end` before or after the `event`-th write of a row, move of a file or record; return the counter."""
    counter = itertools.count()

    def watched(function):
        def call(*arguments, **options):
            if next(counter) == event:
                end()
            result = function(*arguments, **options)
            if next(counter) == event:
                end()
            return result

        return call

    for owner, name in (ShardWriter, "write"), (Storage, "take"), (WorkFolder, "write"), (WorkFolder, "mark_finished"):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return counter


def interrupt():
    raise KeyboardInterrupt


def killed(monkeypatch, event, *arguments, **options):
    """Run a preparation in a forked process that ends without any clearing up at an event."""
    if not (child := os.fork()):
        status = 1
        try:
            ending_at(monkeypatch, event, lambda: os._exit(9))
            run(*arguments, **options)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# The same bytes.

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.mark.parametrize("order", [(1, 0), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_partitions_make_the_same_folder(tmp_path, whole, order):
    inputs, options, expected, _ = whole
    if options.get("deduplicate"):
        for index in order:
            run(tmp_path / "out", inputs, partition=(index, 2), hash_only=True, **options)
        run(tmp_path / "out", inputs, hash_only=True, **options)
    for index in order:
        run(tmp_path / "out", inputs, partition=(index, 2), **options)
        assert not (tmp_path / "out/train").exists()
    prepare.merge(str(tmp_path / "out"), overwrite=False)
    assert digests(tmp_path / "out") == expected and folders(tmp_path / "out") == DONE


@pytest.mark.parametrize("seed", SEEDS)
def test_an_interrupted_preparation_goes_on(tmp_path, whole, seed):
    inputs, options, expected, events = whole
    generator = np.random.default_rng([seed, events])
    for share in (0.6, 0.35):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            ending_at(patch, generator.integers(share * events), interrupt)
            run(tmp_path / "out", inputs, **options)
        assert not (tmp_path / "out/train").exists() and not (tmp_path / "out/summary.json").exists()
    run(tmp_path / "out", inputs, **options)
    assert digests(tmp_path / "out") == expected and folders(tmp_path / "out") == DONE


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_preparation_goes_on(tmp_path, whole, seed, monkeypatch):
    inputs, options, expected, events = whole
    generator = np.random.default_rng([seed, events])
    for share in (0.6, 0.35):
        assert killed(monkeypatch, generator.integers(share * events), tmp_path / "out", inputs, **options) == 9
        assert not (tmp_path / "out/train").exists() and not (tmp_path / "out/summary.json").exists()
    run(tmp_path / "out", inputs, **options)
    assert digests(tmp_path / "out") == expected and folders(tmp_path / "out") == DONE


def test_finished_units_are_not_done_again(tmp_path, corpus_files, monkeypatch):
    writes = []
    run(tmp_path / "out", corpus_files, partition=(0, 2))
    run(tmp_path / "out", corpus_files, partition=(1, 2))
    monkeypatch.setattr(ShardWriter, "write", lambda *arguments: writes.append(arguments))
    run(tmp_path / "out", corpus_files)
    assert not writes and folders(tmp_path / "out") == DONE


# The right rows.


def naive_parts(inputs, unit_size, limit=None):
    """Yield the rows of each part; a stream's parts end once they have `unit_size` bytes of JSON."""
    files = units.sources(PrepareConfig("", 2, inputs=inputs))
    for unit in units.cut(files, unit_size):
        part, size = [], 0
        for row, _ in units.rows(unit):
            if unit.is_stream and size >= unit_size:
                yield part
                part, size = [], 0
            part.append(row)
            size += row.size
        yield part


def texts_of(inputs, unit_size):
    """Yield the good texts of each part."""
    for part in naive_parts(inputs, unit_size):
        yield [row.values["text"] for row in part if isinstance(row.values.get("text"), str)]


def concatenated(tokenizer, parts):
    rows = []
    for texts in parts:
        tokens = [token for text in texts for token in [*tokenizer.encode_text([text])[0], tokenizer.eos_id]]
        rows += [tokens[i : i + 32] for i in range(0, len(tokens) - 31, 32)]
    return rows


def prepared(output):
    return [sample["tokens"].tolist() for sample in samples(output / "train")]


def test_tokens_are_those_of_the_rows_in_order(tmp_path, corpus_files):
    summary = run(tmp_path / "out", corpus_files, held_out=0.0)
    parts = list(naive_parts(corpus_files, UNIT))
    assert 10 <= len(parts) <= 20, "several units, and several parts of the compressed file"
    tokenizer, texts = DiffusionTokenizer(TOKENIZER), list(texts_of(corpus_files, UNIT))
    assert prepared(tmp_path / "out") == concatenated(tokenizer, texts)
    rows = sum(map(len, parts))
    assert (summary.rows, summary.bad_rows) == (rows, 6) and rows - 6 == sum(map(len, texts))
    encoded = [tokenizer.encode_text([text])[0] for part in texts for text in part]
    assert summary.tokens == sum(len(ids) + 1 for ids in encoded)
    assert summary.tail_tokens_dropped == summary.tokens - 32 * summary.sequences["train"]
    problems = [row.location for part in parts for row in part if not isinstance(row.values.get("text"), str)]
    assert [p.rpartition(": ")[0].split(": ")[0] for p in summary.problems] == problems


@pytest.mark.parametrize("rows_per_round", [1 << 26, 7])
def test_the_first_copy_of_a_document_stays(tmp_path, corpus_files, monkeypatch, rows_per_round):
    monkeypatch.setattr(deduplication, "ROUND", rows_per_round)
    summary = run(tmp_path / "out", corpus_files, held_out=0.0, deduplicate=True)
    seen, parts, duplicates = set(), [], 0
    for texts in texts_of(corpus_files, UNIT):
        parts.append([])
        for text in texts:
            duplicates += text in seen
            if text not in seen:
                parts[-1].append(text)
            seen.add(text)
    assert summary.duplicates == duplicates == 6, "within a file, across files and formats"
    assert prepared(tmp_path / "out") == concatenated(DiffusionTokenizer(TOKENIZER), parts)
    assert summary.bad_rows == 6, "bad rows are no duplicates of each other"


def test_duplicates_of_rows_without_text_and_of_empty_units(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [*[{"text": WORDS[0] * 30}] * 3, "", "bad", *[""] * 300])
    summary = run(tmp_path / "out", [rows], deduplicate=True, unit_size=250, held_out=0.0, seq_len=8)
    assert (summary.rows, summary.bad_rows, summary.duplicates) == (4, 1, 2)
    assert summary.sequences["train"] > 0


def test_units_do_not_change_fine_tuning_rows(tmp_path, conversations):
    options = KINDS["fine-tuning"]
    small, large = (
        run(tmp_path / name, conversations, held_out=0.0, unit_size=size, **options)
        for name, size in (("small", 700), ("large", 1 << 20))
    )
    assert small.sequences == large.sequences and small.padding == large.padding and small.rows == 40
    lengths = [np.load(tmp_path / name / "train/lengths.npy") for name in ("small", "large")]
    np.testing.assert_array_equal(*lengths)
    assert len(set(lengths[0].reshape(-1, 2)[:, 1].tolist())) > 2
    found = [samples(tmp_path / name / "train") for name in ("small", "large")]
    for one, other in zip(*found, strict=True):
        assert one["tokens"].tolist() == other["tokens"].tolist() and one["labels"].tolist() == other["labels"].tolist()
    cards = [shards.read_card(str(tmp_path / name / "train")) for name in ("small", "large")]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_the_limit_counts_rows_over_all_files(tmp_path, kind):
    texts = documents(5, 8)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if kind == "a.json":
        content = json.dumps([{"text": text} for text in texts])
    data = gzip.compress(content.encode()) if kind.endswith("gz") else content.encode()
    (tmp_path / kind).write_bytes(data)
    second = jsonl(tmp_path / "b.jsonl", [{"text": text} for text in documents(6, 8)])
    for limit in (8, 11):
        inputs = [str(tmp_path / kind), second]
        summary = run(tmp_path / f"{limit}", inputs, limit=limit, held_out=0.0, unit_size=300)
        assert summary.rows == limit


# Damage and mistakes.


@pytest.fixture
def begun(tmp_path, corpus_files):
    """Prepare half of the units; return the output."""
    run(tmp_path / "out", corpus_files, partition=(0, 2))
    return tmp_path / "out"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "remove", "shorten", "record", "packed lengths"])
def test_a_damaged_unit_is_done_again(tmp_path, corpus_files, damage):
    run(tmp_path / "expected", corpus_files)
    run(tmp_path / "out", corpus_files, partition=(0, 2))
    shard = sorted((tmp_path / "out/train.partial").glob("*/*.mds"))[-1]
    record = sorted((tmp_path / "out").glob(f"{FOLDER}/*/*-*.json"))[0]
    if damage == "flip":
        flip(shard)
    elif damage == "remove":
        shard.unlink()
    elif damage == "shorten":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "record":
        record.write_bytes(record.read_bytes()[:-40])
    else:
        values = json.loads(record.read_bytes())
        record.write_text(json.dumps({**values, "lengths": {"train": "AAAA"}}))
    run(tmp_path / "out", corpus_files)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


@pytest.mark.parametrize("changes, words", [
    ({"seq_len": 16}, "--seq-len was 32, and is now 16"),
    ({"pack_documents": True}, "--pack-documents was False, and is now True"),
    ({"unit_size": 999}, "--unit-size was 1100, and is now 999"),
    ({"held_out": 0.5}, "--held-out was 0.2, and is now 0.5"),
    ({"tokenizer": "other"}, "its tokenizer was another one"),
    ({"inputs": 1}, "d6.jsonl is gone"),
    ({"inputs": 2}, "the inputs were in another order"),
    ({"touched": True}, "a.jsonl has changed"),
])  # fmt: skip
def test_another_command_is_refused_unless_it_overwrites(tmp_path, corpus_files, changes, words):
    local = [shutil.copy2(file, tmp_path) for file in corpus_files]
    run(tmp_path / "out", local, partition=(0, 2))
    before = tree(tmp_path / "out")
    changes = dict(changes)
    order = {1: local[:-1], 2: local[::-1]}
    inputs = order.get(changes.pop("inputs", 0), local)
    if changes.pop("touched", False):
        os.utime(local[0], (1, 1))
    if "tokenizer" in changes:
        changes["tokenizer"] = str(shutil.copytree(TOKENIZER, tmp_path / "other"))
        (tmp_path / "other/chat_template.jinja").write_text("x")
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", inputs, **changes)
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1
    assert "finished parts of another preparation" in str(error.value)
    assert tree(tmp_path / "out") == before


def test_overwrite_discards_an_unfinished_preparation(tmp_path, begun, corpus_files):
    run(begun, corpus_files, overwrite=True, seq_len=16)
    assert folders(begun) == DONE
    run(tmp_path / "new", corpus_files, seq_len=16)
    assert digests(begun) == digests(tmp_path / "new")


def test_merge_needs_all_units(tmp_path, begun, corpus_files):
    before = tree(begun)
    with pytest.raises(UserError, match=r"of \d+ units in .* are not prepared \(1, 3, 5") as error:
        prepare.merge(str(begun), overwrite=False)
    assert str(error.value).endswith("then merge again.") and tree(begun) == before
    run(begun, corpus_files, partition=(1, 2))
    shard = sorted((begun / "train.partial").glob("*/*.mds"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"The shard {shard} is missing or has another size .*\(unit 0\)"):
        prepare.merge(str(begun), overwrite=False)
    shard.write_bytes(content)
    prepare.merge(str(begun), overwrite=False)
    with pytest.raises(UserError, match="There is no unfinished preparation in"):
        prepare.merge(str(begun), overwrite=False)


def test_partitions_need_the_comparison_of_all_hashes(tmp_path, corpus_files):
    for index in (0, 1):
        run(tmp_path / "out", corpus_files, partition=(index, 2), deduplicate=True, hash_only=True)
    with pytest.raises(UserError, match="The duplicates are not known yet; run all partitions with --hash-only, then "):
        run(tmp_path / "out", corpus_files, partition=(0, 2), deduplicate=True)


@pytest.mark.parametrize("ending", ["hashes", "duplicates"])
def test_damaged_hashes_are_made_anew(tmp_path, corpus_files, ending):
    run(tmp_path / "whole", corpus_files, deduplicate=True)
    run(tmp_path / "out", corpus_files, deduplicate=True, hash_only=True)
    records = next(path.parent for path in (tmp_path / "out").rglob("plan.json"))
    damaged = sorted(records.glob(f"*.{ending}"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    if ending == "hashes":
        (records / "duplicates.json").unlink()
    with pytest.raises(UserError, match=rf"{damaged} was damaged and is removed; repeat the command"):
        run(tmp_path / "out", corpus_files, deduplicate=True)
    run(tmp_path / "out", corpus_files, deduplicate=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_preparation_that_another_command_discards_stops(tmp_path, corpus_files, monkeypatch):
    out, write = tmp_path / "out", WorkFolder.write

    def overtaken(self, record):
        write(self, record)
        monkeypatch.setattr(WorkFolder, "write", write)
        run(out, corpus_files, seq_len=16, overwrite=True)

    monkeypatch.setattr(WorkFolder, "write", overtaken)
    with pytest.raises(UserError, match=rf"Another command has finished or discarded the preparation in {out}; this"):
        run(out, corpus_files, partition=(1, 2))
    run(tmp_path / "whole", corpus_files, seq_len=16)
    assert digests(out) == digests(tmp_path / "whole")


def test_an_output_in_a_folder_of_inputs_goes_on(tmp_path, corpus_files, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in corpus_files:
        shutil.copy(path, folder)
    run(tmp_path / "whole", [str(folder)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "mark_finished", end_now)
        run(folder / "out", [str(folder)])
    run(folder / "out", [str(folder)])
    assert digests(folder / "out") == digests(tmp_path / "whole")


def end_now(*_):
    raise KeyboardInterrupt


def test_lost_pieces_of_an_unfinished_preparation(tmp_path, corpus_files, monkeypatch):
    run(tmp_path / "whole", corpus_files)
    out = tmp_path / "out"

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(WorkFolder, "mark_finished", end_now)
            run(out, corpus_files)
        return next(path.parent for path in out.rglob("plan.json"))

    for name, content in (("setup.json", ""), ("plan.json", ""), ("plan.json", '{"later": 1}')):
        (begin() / name).write_text(content)
        if name == "plan.json":
            with pytest.raises(UserError, match=r"finished parts of another preparation .*its plan is damaged"):
                run(out, corpus_files, seq_len=16)
            with pytest.raises(
                UserError, match=r"plan.json is damaged, or of another version of memdlm_dist; repeat the "
            ):
                prepare.merge(str(out), overwrite=False)
        run(out, corpus_files)
        assert digests(out) == digests(tmp_path / "whole")
    begin()
    shutil.rmtree(out / "tokenizer.partial")
    stale = out / "train.partial/000999-0000/shard.00000.mds"
    stale.parent.mkdir()
    stale.write_bytes(b"of another plan")
    run(out, corpus_files)
    assert digests(out) == digests(tmp_path / "whole")


def test_rows_that_differ_in_training_are_no_duplicates(tmp_path):
    rows = [{"prompt": p, "response": "yes"} for p in ("abc", "abc\n\n", "abc")]
    rows.append({"messages": [{"role": "user 3", "content": "x"}, {"role": "assistant", "content": "yes"}]})
    rows.append({"messages": [{"role": "user", "content": "3x"}, {"role": "assistant", "content": "yes"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path / "out", [str(path)], deduplicate=True, held_out=0.0).duplicates == 1


def test_the_sample_for_a_tokenizer_is_bounded_in_text(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": "same " * 50}).encode() + b"\n" for _ in range(2000))))
    size = path.stat().st_size
    config = PrepareConfig(tmp_path, 32, inputs=(str(path),), tokenizer_sample=20_000, held_out=0.0)
    assert size < 20_000
    (unit,) = units.cut(units.sources(config), 1 << 20)
    jobs = [Job(config, unit, ("", ""), "", Card(32, 0, 0, 0), str(tmp_path / "scratch"))]
    assert 20_000 <= sum(map(len, tokenizer_sample.texts(jobs, 1, None))) < 20_300


# Files of the user, and an earlier output.


def test_an_earlier_output_stays_until_the_end(tmp_path, corpus_files, monkeypatch):
    run(tmp_path / "out", corpus_files, seq_len=16)
    before = digests(tmp_path / "out")

    def check(function):
        def call(*arguments):
            now = digests(tmp_path / "out")
            assert {name: now.get(name) for name in before} == before
            return function(*arguments)

        return call

    monkeypatch.setattr(Storage, "take", check(Storage.take))
    monkeypatch.setattr(WorkFolder, "mark_finished", check(WorkFolder.mark_finished))
    run(tmp_path / "out", corpus_files, overwrite=True)
    assert digests(tmp_path / "out") != before and folders(tmp_path / "out") == DONE


FOREIGN = ("memdlm_units/notes.txt", "memdlm_units/{plan}/notes.txt", "memdlm_units/mine/a.txt")


@pytest.mark.parametrize("end", ["finish", "discard", "fail"])
def test_foreign_files_next_to_the_records_stay(begun, corpus_files, end):
    (plan,) = (path.parent.name for path in begun.glob(f"{FOLDER}/*/plan.json"))
    names = {file.format(plan=plan) for file in FOREIGN}
    for name in names:
        (begun / name).parent.mkdir(exist_ok=True)
        (begun / name).write_text("mine")
    if end == "fail":
        with pytest.raises(UserError, match="makes no training sequence"):
            run(begun, corpus_files[3:4], seq_len=4096, overwrite=True)
    else:
        run(begun, corpus_files, **({} if end == "finish" else {"seq_len": 16, "overwrite": True}))
    rest = {path.relative_to(begun).as_posix() for path in begun.rglob("*") if path.is_file()}
    rest = {name for name in rest if name.split("/")[0] not in DONE}
    assert rest == names and all((begun / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("file", ["train.partial/notes.txt", "train.partial/000000-0000/notes.txt"])
def test_foreign_files_among_the_staged_shards_stop_the_command(begun, corpus_files, file, overwrite):
    (begun / file).write_text("mine")
    before = tree(begun)
    for changes in ({}, {"seq_len": 16}):
        with pytest.raises(UserError, match=r"which no preparation wrote|finished parts of another"):
            run(begun, corpus_files, overwrite=overwrite, **changes)
        assert tree(begun) == before
    (begun / file).unlink()
    run(begun, corpus_files)
    assert folders(begun) == DONE


def test_a_foreign_file_that_appears_meanwhile_costs_no_work(tmp_path, begun, corpus_files, monkeypatch):
    notes = begun / "train.partial/notes.txt"
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"holds notes\.txt, which no preparation wrote"),
    ):
        patch.setattr(WorkFolder, "mark_finished", lambda *_: notes.write_text("mine"))
        run(begun, corpus_files)
    notes.unlink()
    monkeypatch.setattr(ShardWriter, "write", None)  # not called again
    run(begun, corpus_files)
    assert folders(begun) == DONE


# Ends at any file operation.

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def ending_at_operation(number):
    """End this process before the `number`-th operation that changes a file."""
    counter = itertools.count()

    def hook(event, arguments):
        changes = event in WRITES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE)
        if changes and next(counter) == number:
            os._exit(9)

    sys.addaudithook(hook)


def cut_off(number, *arguments, **options):
    if not (child := os.fork()):
        status = 1
        with contextlib.suppress(BaseException):
            ending_at_operation(number)
            run(*arguments, **options)
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("earlier, step", [
    (True, 23), *(pytest.param(earlier, 1, marks=pytest.mark.slow) for earlier in (False, True))
])  # fmt: skip
def test_a_preparation_that_ends_before_any_file_operation_goes_on(tmp_path, step, earlier):
    rows = [jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in documents(4, 8)])]
    options = {"unit_size": 600, "overwrite": earlier, "held_out": 0.3}
    run(tmp_path / "expected", rows, **options)
    run(tmp_path / "before", rows, seq_len=16, **options)
    expected, before = digests(tmp_path / "expected"), digests(tmp_path / "before")
    for number in itertools.count(0, step):
        output = tmp_path / f"{number}"
        if earlier:
            shutil.copytree(tmp_path / "before", output)
        status = cut_off(number, output, rows, **options)
        if status == 0:
            break
        assert status == 9
        found = digests(output) if output.exists() else {}
        whole_output = {name: digest for name, digest in found.items() if name.split("/")[0] in DONE}
        if earlier and (output / "train.partial").exists() and not list(output.glob("*.replaced")):
            assert whole_output == before, number
        try:
            run(output, rows, **options)
        except UserError as error:  # the end was after the last renaming, perhaps during the removal of the records
            assert not earlier and "is not empty; choose another --output" in str(error), (number, error)
            shutil.rmtree(output / FOLDER, ignore_errors=True)
        assert digests(output) == expected and folders(output) == DONE, number
        shutil.rmtree(output)
    assert number > 50


# Two users of one output.


def test_two_commands_at_one_output(tmp_path, corpus_files, monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE", 0.1)
    output = tmp_path / "out"
    if not (child := os.fork()):
        with writer.claimed(str(output), writer.this_process()):
            (tmp_path / "ready").touch()
            signal.pause()
    while not (tmp_path / "ready").exists():
        pass
    before = tree(output)
    for action in (lambda: run(output, corpus_files), lambda: prepare.merge(str(output), overwrite=True)):
        with pytest.raises(UserError, match=re.escape(f"Another run writes to {output}: job ")):
            action()
    assert tree(output) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run(output, corpus_files)
    assert folders(output) >= DONE
