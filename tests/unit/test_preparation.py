"""Data preparation keeps foreign files, the whole corpus and the meaning of its text."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from memdlm_dist.data import shards
from memdlm_dist.data.dataset import TokenDataset
from memdlm_dist.data.preparation import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.runtime import writer
from tools import prepare_data

DEBUG = "tests/assets/debug"
TEXT = "the quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(tmp_path, *inputs, **changes):
    settings = {"output": tmp_path / "out", "seq_len": 32, "tokenizer": f"{DEBUG}/tokenizer", "held_out": 0.0}
    return prepare.prepare(PrepareConfig(inputs=inputs, **(settings | changes)), report=lambda _: None)


def samples(folder):
    dataset = TokenDataset(local=str(folder), batch_size=1, shuffle=False, check_hash="xxh64")
    return [dataset[i] for i in range(dataset.size)]


def text_of(folder, tokenizer):
    ids = [int(t) for sample in samples(folder) for t in sample["tokens"]]
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=False)


def tree(folder):
    return {
        path: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def changed_tokenizer(folder, change=None, config=None):
    """Copy the debug tokenizer with its JSON changed; return the folder."""
    shutil.copytree(f"{DEBUG}/tokenizer", folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    if change is not None:
        change(description)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


# Foreign files.


FOREIGN = [
    (False, "tokenizer/tokenizer.json"),
    (False, "summary.json"),
    *((prepared, file) for prepared in (False, True) for file in (
        "tokenizer/README.md", "train.partial/notes.txt", "train/shard.backup/thesis.txt", "train/shard.00007.mds",
    )),
]  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("prepared, file", FOREIGN)
def test_foreign_files_are_left_alone(tmp_path, file, prepared, overwrite):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    if prepared:
        run(tmp_path, rows)
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"no preparation|is not empty; choose another --output or pass --overwrite"):
        run(tmp_path, rows, overwrite=overwrite)
    assert tree(tmp_path / "out") == before


def test_what_an_earlier_release_wrote_is_replaced(tmp_path):
    shutil.copytree(DEBUG, tmp_path / "out")
    assert not list(tmp_path.rglob("memdlm_files.json")), "the debug data predate manifests"
    run(tmp_path, jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}]), overwrite=True)
    assert shards.read_card(str(tmp_path / "out/train")).seq_len == 32
    run(tmp_path, str(tmp_path / "rows.jsonl"), overwrite=True, seq_len=16)
    assert shards.read_card(str(tmp_path / "out/train")).seq_len == 16


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_tokenizer_in_the_output_folder_stays(tmp_path, overwrite):
    changed_tokenizer(tmp_path / "out/tokenizer")
    (tmp_path / "out/tokenizer/vocab.json").write_text("{}")
    rows, before = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}]), tree(tmp_path / "out/tokenizer")
    run(tmp_path, rows, tokenizer=str(tmp_path / "out/tokenizer"), overwrite=overwrite)
    assert tree(tmp_path / "out/tokenizer") == before


def test_the_tokenizer_in_the_output_folder_gets_a_token(tmp_path):
    rows, folder = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}]), str(tmp_path / "out/tokenizer")
    run(tmp_path, rows)
    with pytest.raises(UserError, match="is not empty"):
        run(tmp_path, rows, tokenizer=folder, mask_token="<new>")
    run(tmp_path, rows, tokenizer=folder, mask_token="<new>", overwrite=True)
    assert shards.read_card(str(tmp_path / "out/train")).mask_token_id == DiffusionTokenizer(folder).mask_id == 512


def test_sigterm_leaves_nothing_unfinished(tmp_path, capsys):
    run(tmp_path, jsonl(tmp_path / "row.jsonl", [{"text": TEXT}]))
    before = tree(tmp_path / "out")
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 20_000)
    handler, ended = signal.getsignal(signal.SIGTERM), threading.Event()

    def end_when_begun():
        while not (tmp_path / "out/heldout.partial").exists() and not ended.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_when_begun).start()
    arguments = ["--input", rows, "--output", str(tmp_path / "out"), "--seq-len", "32", "--overwrite"]
    with pytest.raises(SystemExit) as end:
        prepare_data.main([*arguments, "--tokenizer", f"{DEBUG}/tokenizer"])
    ended.set()
    assert end.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err.count("Received SIGTERM") == 1
    assert tree(tmp_path / "out") == before


def test_a_killed_preparation_is_cleared_away(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    run(tmp_path, rows)
    for name in ("train", "tokenizer"):
        partial = shutil.copytree(tmp_path / "out" / name, tmp_path / "out" / f"{name}.partial")
        (partial / "memdlm_files.json").write_text('{"files": null}')  # a manifest that is still being written
    run(tmp_path, rows, overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"train", "heldout", "tokenizer", "summary.json"}


# The whole corpus.


def test_sections_of_the_tokenizer_that_cut_and_fill_are_not_applied(tmp_path):
    def change(description):
        cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5}
        description |= {"truncation": cut, "padding": {**fill, "pad_type_id": 0, "pad_token": "x"}}

    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}] * 4)
    plain = run(tmp_path, rows, output=tmp_path / "plain")
    cutting = run(tmp_path, rows, tokenizer=changed_tokenizer(tmp_path / "tokenizer", change))
    assert cutting.tokens == plain.tokens > 200


@pytest.mark.parametrize("suffix, compress", [
    ("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstandard.compress),
])  # fmt: skip
def test_a_compressed_file_is_read_to_its_end(tmp_path, suffix, compress):
    row = json.dumps({"text": "".join(map(chr, np.random.default_rng(0).integers(97, 122, 5000)))}).encode() + b"\n"
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(compress(row * 3) + compress(row))
    assert run(tmp_path, str(path)).rows == 4
    path.write_bytes(compress(row * 3 + row)[:-40])
    with pytest.raises(UserError, match=rf"The input {re.escape(str(path))} cannot be read \(.*end"):
        run(tmp_path, str(path), output=tmp_path / "cut")


def test_token_ids_above_the_number_of_tokens(tmp_path):
    vocabulary = {"<unk>": 0, "<eos>": 1, "<mask>": 2, **{f"w{i}": 70_000 + i for i in range(5)}}
    pieces = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.add_special_tokens(["<eos>", "<mask>"])
    (tmp_path / "tokenizer").mkdir()
    pieces.save(str(tmp_path / "tokenizer/tokenizer.json"))
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": "w0 w3 w4 <mask> <eos> what " * 8}])
    run(tmp_path, rows, tokenizer=str(tmp_path / "tokenizer"), mask_token="<mask>", eos_token="<eos>")
    assert shards.read_card(str(tmp_path / "out/train")).vocab_size == 70_005
    tokens = samples(tmp_path / "out/train")[0]["tokens"].tolist()
    assert tokens[:3] == [70_000, 70_003, 70_004]
    assert 2 not in tokens and 1 not in tokens, "text never encodes to a special token"


# Special tokens in the text.

WRITTEN = f"a <|mask|> and <|endoftext|> and <tool>. {TEXT}"


@pytest.fixture
def with_tool(tmp_path):
    """Return a copy of the debug tokenizer with two more added tokens that are not special."""
    folder = changed_tokenizer(tmp_path / "with_tool")
    pieces = Tokenizer.from_file(f"{folder}/tokenizer.json")
    pieces.add_tokens([AddedToken("<tool>"), AddedToken("    ")])
    pieces.save(f"{folder}/tokenizer.json")
    return folder


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "row", [{"text": WRITTEN}, {"prompt": "p", "response": WRITTEN}, {"prompt": WRITTEN, "response": "r"}], ids=repr
)
def test_text_never_becomes_a_special_token(tmp_path, with_tool, row, pack, capsys):
    rows = jsonl(tmp_path / "rows.jsonl", [row])
    arguments = [
        "--input", rows, "--output", str(tmp_path / "out"), "--seq-len", "256", "--tokenizer", with_tool,
        "--held-out", "0", *(["--pack-documents"] if pack else []),
    ]  # fmt: skip
    if "text" in row:
        arguments[5] = "128"
    assert prepare_data.main(arguments) == 0
    tokenizer = DiffusionTokenizer(with_tool)
    sample = samples(tmp_path / "out/train")[0]
    tokens = sample["tokens"].tolist()
    assert tokenizer.mask_id not in tokens and tokenizer.tokenizer.token_to_id("<tool>") not in tokens
    assert WRITTEN[:100] in (decoded := tokenizer.tokenizer.decode(tokens, skip_special_tokens=False))
    ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_id]
    assert not ends or ends == list(range(ends[0], len(tokens))), decoded
    assert "kept as text: <|mask|> 1 times, <|endoftext|> 1 times, <tool> 1 times" in capsys.readouterr().out
    counts = json.loads((tmp_path / "out/summary.json").read_text())["special_tokens"]
    assert counts == {"<|mask|>": 1, "<|endoftext|>": 1, "<tool>": 1}


def test_runs_of_blanks_are_text(with_tool):
    tokenizer = DiffusionTokenizer(with_tool)
    assert tokenizer.encode_text(["x    y"]) == tokenizer.encode_plain(["x    y"])
    assert tokenizer.tokenizer.token_to_id("    ") in tokenizer.encode_text(["x    y"])[0]


def test_special_tokens_parsed_on_demand(tmp_path):
    rows = [{"text": f"one <|endoftext|> two {TEXT}"}, {"text": f"never <|mask|> {TEXT}"}]
    summary = run(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), parse_special_tokens=True)
    tokens = [t for s in samples(tmp_path / "out/train") for t in s["tokens"].tolist()]
    tokenizer = DiffusionTokenizer(f"{DEBUG}/tokenizer")
    assert tokens.index(tokenizer.eos_id) < 10 and tokenizer.mask_id not in tokens
    assert summary.bad_rows == 1 and "rows.jsonl:2: the text contains the mask token '<|mask|>'" in summary.problems[0]
    assert summary.special_tokens == {"<|endoftext|>": 1}


def test_mask_tokens_that_are_something_else(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    with pytest.raises(UserError, match=r"has <\|endoftext\|> as mask and as end-of-text token"):
        run(tmp_path, rows, mask_token="<|endoftext|>")
    with pytest.raises(UserError, match="The mask token self is an ordinary word"):
        run(tmp_path, rows, mask_token="self")
    same = {"mask_token": "<|mask|>", "eos_token": "<|mask|>"}
    with pytest.raises(UserError, match=r"has <\|mask\|> as mask and as end-of-text token"):
        DiffusionTokenizer(changed_tokenizer(tmp_path / "same", config=same))


# Bad rows.


def test_one_bad_row_is_one_bad_row(tmp_path):
    good = {"text": TEXT}
    rows = [
        good,
        '{"text": "half a pair \\ud800"}',
        '{"text": "x", "n": ' + "1" * 5000 + "}",
        '{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
        {"text": "a" * 40 + "!"},  # the tokenizer's regular expression exceeds its retry limit and panics
        '{"text": "\udcff"}',
        good,
    ]
    path = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))

    pieces = Tokenizer.from_file(f"{DEBUG}/tokenizer/tokenizer.json")
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("(a+)+$"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder = changed_tokenizer(tmp_path / "panicking")
    pieces.save(f"{folder}/tokenizer.json")
    summary = run(tmp_path, str(path), tokenizer=folder)
    assert (summary.rows, summary.bad_rows) == (7, 5)
    assert {p.split(": ")[0] for p in summary.problems} == {f"{path}:{line}" for line in range(2, 7)}
    said = "\n".join(summary.problems)
    for part in ("not valid Unicode", "digits", "nested too deeply", "retry-limit", "not valid JSON ('utf-8'"):
        assert part in said, said

    array = tmp_path / "rows.json"
    array.write_bytes(b"[" + b",\n".join(path.read_bytes().splitlines()) + b"]")
    assert run(tmp_path, str(array), output=tmp_path / "array", tokenizer=folder).bad_rows == 5
    trained = run(tmp_path, str(path), output=tmp_path / "trained", tokenizer=None, train_tokenizer=300)
    assert trained.bad_rows == 4, "a newly trained tokenizer encodes the long word"


def test_parquet_that_is_not_utf8(tmp_path):
    column = pyarrow.array([TEXT.encode(), b"\xff", TEXT.encode()], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    summary = run(tmp_path, str(tmp_path / "rows.parquet"))
    assert (summary.rows, summary.bad_rows) == (3, 1) and "rows.parquet:2: " in summary.problems[0]


def test_rows_have_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr("memdlm_dist.data.corpus.MAX_ROW", 1000)
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "x" * 5000}, {"text": TEXT}, {"text": "y" * 980}, {"text": TEXT}])
    summary = run(tmp_path, path)
    assert (summary.rows, summary.bad_rows) == (4, 1) and "rows.jsonl:1: longer than 1,000 bytes" in summary.problems[0]


# Unusual inputs and outputs.


@pytest.mark.parametrize(
    "content, rows",
    [
        (json.dumps({"text": TEXT}, indent=2).encode(), 1),
        (b"\xef\xbb\xbf" + json.dumps([{"text": TEXT}, {"text": 'a, "[b]" ] \\" {'}]).encode(), 2),
        (b"\xef\xbb\xbf" + json.dumps({"text": TEXT}).encode() + b'\n{"text": "x"}', 2),
    ],
    ids=["an object over several lines", "an array with a byte order mark", "lines with a byte order mark"],
)
def test_ways_to_write_json(tmp_path, content, rows):
    (tmp_path / "a [1].json").write_bytes(content)
    summary = run(tmp_path, str(tmp_path / "a [1].json"))
    assert (summary.rows, summary.bad_rows) == (rows, 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (json.dumps({"text": TEXT}).encode("utf-16"), "is not UTF-8 but UTF-16 or UTF-32; convert it to UTF-8."),
        (json.dumps({"text": TEXT}).encode("utf-16-le"), "is not UTF-8 but UTF-16 or UTF-32; convert it to UTF-8."),
        (b'[{"text": "x"}, {"te', "is not valid JSON: the array has no end; replace the file if it is truncated."),
        (b'[{"text": "x"}] {', "is not valid JSON: other content follows the array; remove it."),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        run(tmp_path, str(tmp_path / "a.json"))
    assert str(error.value) == f"The input {tmp_path / 'a.json'} {message}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--output", ""), "--output is empty; name a folder to write to."),
        (("--seq-len", "99999999999"), "--seq-len must be from 2 to 16,777,216, but is 99999999999."),
        (("--output", "{}/file"), "file/train is a file, not a folder; remove it or choose another --output."),
        (("--output", "{}/link"), "link/train is a symbolic link, not a folder; remove it or choose another --output."),
        (("--output", "{}/rows.jsonl"), "cannot be written to"),
        (
            ("--input", "data:text/plain,x.jsonl"),
            "The input data:text/plain,x.jsonl cannot be accessed (a data: URL na",
        ),
        (("--tokenizer", "{}/broken"), "cannot be loaded ("),
    ],
)
def test_arguments(tmp_path, capsys, arguments, message):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    for name in ("file", "link", "broken", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "file/train").write_text("mine")
    (tmp_path / "link/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    before = tree(tmp_path)
    base = {"--input": rows, "--output": str(tmp_path / "out"), "--seq-len": "32", "--tokenizer": f"{DEBUG}/tokenizer"}
    base[arguments[0]] = arguments[1].format(tmp_path)
    assert prepare_data.main([*(part for pair in base.items() for part in pair), "--overwrite"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error and error.endswith(".") and not error.endswith("..")
    assert {path: content for path, content in tree(tmp_path).items() if path != tmp_path / "out"} == before


# The card.


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_shards_of_an_earlier_release_are_read(split):
    card = shards.read_card(f"{DEBUG}/{split}")
    assert "format" not in json.loads((prepare.Path(DEBUG) / split / "memdlm.json").read_text()) and card.format == 1
    read = samples(f"{DEBUG}/{split}")
    assert len(read) == card.sequences and (read[0]["labels"] != IGNORE_INDEX).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"format": 4},
            "has format 4, but this version of memdlm_dist reads format 3 at most; use a version that reads ",
        ),
        ({"format": 4, "new": 1}, "has format 4, but this version of memdlm_dist reads format 3 at most"),
        ({"new": 1}, "has the key 'new', which format 1 does not have; use the version of memdlm_dist that wrote it"),
        ({"seq_len": "128"}, "has no valid seq_len; prepare the data anew"),
    ],
)
def test_cards_of_another_release(tmp_path, change, message):
    folder = shutil.copytree(f"{DEBUG}/train", tmp_path / "train")
    (folder / "memdlm.json").write_text(json.dumps(json.loads((folder / "memdlm.json").read_text()) | change))
    with pytest.raises(UserError) as error:
        shards.read_card(str(folder))
    assert str(error.value).startswith(f"The shards' card {folder}/memdlm.json {message}")


# Killed preparations and concurrent ones.


def test_a_preparation_that_is_killed_while_folders_change_places_is_finished(tmp_path, monkeypatch):
    old, new = ({"text": word + TEXT} for word in ("old ", "new "))
    run(tmp_path, jsonl(tmp_path / "old.jsonl", [old]))
    before = (tmp_path / "out/train/000000-0000/shard.00000.mds").read_bytes()
    renamed: list[Path] = []

    def rename(self, target):
        if len(renamed) == 3:
            raise KeyboardInterrupt  # stands for a kill: the process does nothing more
        renamed.append(Path(os.rename(self, target) or target))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", rename)
        run(tmp_path, jsonl(tmp_path / "new.jsonl", [new]), overwrite=True)
    assert not (tmp_path / "out/train").exists() and (tmp_path / "out/train.partial").exists()
    assert (tmp_path / "out/train.replaced/000000-0000/shard.00000.mds").read_bytes() == before
    # The next preparation finishes the renames before it checks the folder.
    with pytest.raises(UserError, match="is not empty; choose another --output or pass --overwrite"):
        run(tmp_path, jsonl(tmp_path / "new.jsonl", [new]))
    remaining = {path.name for path in (tmp_path / "out").iterdir()}
    assert remaining == {"tokenizer", "train", "heldout", "summary.json"}
    assert (tmp_path / "out/train/000000-0000/shard.00000.mds").read_bytes() != before


def test_two_preparations_of_one_folder(tmp_path, capsys):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time; sys.path.insert(0, {str(Path.cwd())!r})\n"
         "from memdlm_dist.runtime import writer\nfrom pathlib import Path\n"
         f"lock = writer.Lock(Path({str(tmp_path / 'out')!r}), writer.this_process())\nprint('held', flush=True)\n"
         "time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(writer, "PATIENCE", 0)
            arguments = [
                "--input",
                rows,
                "--output",
                str(tmp_path / "out"),
                "--seq-len",
                "64",
                "--train-tokenizer",
                "300",
            ]
            assert prepare_data.main(arguments) == 2
        assert re.search(rf"Another run writes to \S+/out: job .* process {holder.pid}, ", capsys.readouterr().err)
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("manifest", ['{"files": 5}', '{"files": "shard.00000.mds"}', "[" * 100_000, "{}"])
def test_a_strangers_manifest(tmp_path, manifest):
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": TEXT}])
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/shard.00000.mds").write_text("mine")
    (tmp_path / "out/train/memdlm_files.json").write_text(manifest)
    with pytest.raises(UserError, match=r"train holds shard.00000.mds, which no preparation wrote"):
        run(tmp_path, rows, overwrite=True)
    assert (tmp_path / "out/train/shard.00000.mds").read_text() == "mine"


def test_a_string_without_an_end(tmp_path):
    """Parsing tries each quote once; quadratic parsing takes minutes here."""
    path = tmp_path / "rows.json"
    path.write_bytes(b'["' + b'\\"x' * 100_000)
    with pytest.raises(UserError, match=r"rows.json is not valid JSON: the array has no end"):
        run(tmp_path, str(path))


def test_parquet_dates_beyond_pythons(tmp_path):
    table = pyarrow.table({"text": [TEXT, TEXT], "when": pyarrow.array([0, 1 << 30], pyarrow.int32()).cast("date32")})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    summary = run(tmp_path, str(tmp_path / "rows.parquet"))
    assert (summary.rows, summary.bad_rows) == (2, 1)
