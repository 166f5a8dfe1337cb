"""`prepare_data.py inspect`: card, counts, lengths and sequences of prepared data, read from folders and URLs."""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from memdlm_dist.data.preparation import look
from memdlm_dist.data.preparation.contents import Contents
from memdlm_dist.data.preparation.prepare import prepare
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.sequences import TrainingSequence
from memdlm_dist.data.shards import Card, ShardWriter, read_card
from tools import prepare_data

DEBUG = "tests/assets/debug"
ROWS, SEQ_LEN = 8, 128
LINE = "x = f(y)\n"
END = "<|endoftext|>"  # as text
CJK = "é漢字🙂" * 30
HOSTILE = "red \x1b[31m, reversed \u202e, NUL \x00, CR \r, tab \t, wide\u3000space"
SHOWN = r"red \x1b[31m, reversed \u202e, NUL \x00, CR \r, tab " + "\t, wide\u3000space"


@pytest.fixture(autouse=True)
def in_root(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with five outputs: documents in two layouts, fine-tuning rows in three."""
    folder = tmp_path_factory.mktemp("look")
    inputs = {
        "texts": [{"text": text} for text in (CJK, HOSTILE)],
        "rows": [{"prompt": f"{i}? ", "response": LINE * (1 + 2 * i)} for i in range(ROWS)],
    }
    for name, values in inputs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    tokenizer, texts, rows = f"{DEBUG}/tokenizer", (f"{folder}/texts.jsonl",), (f"{folder}/rows.jsonl",)
    request = PrepareConfig(folder / "varied", SEQ_LEN, rows, tokenizer, held_out=0.0, pad_multiple=16)
    prepare(request)
    prepare(replace(request, output=folder / "padded", pad_multiple=None))
    prepare(replace(request, output=folder / "packed", pack_documents=True))
    prepare(replace(request, output=folder / "text", inputs=texts, seq_len=31))
    prepare(replace(request, output=folder / "packed_text", inputs=texts, seq_len=2048, pack_documents=True))
    return folder


@cache
def open_contents(location):
    """Open an output once: streaming frees the shared memory of a data set only when the process ends."""
    return Contents(str(location), "train", None, "")


def report(location, split="train", rows=1000, sequence=0, colour="never", full=False, tokenizer=None):
    return look.report(str(location), split, tokenizer, rows, sequence, colour, full)


def text_of(location, sequence=0, colour="never", full=False):
    """Return the text of a sequence, as in the report."""
    contents = open_contents(location)
    chosen = contents.sequence(sequence)
    ends = len(chosen.tokens_L) if full else look._ENDS
    return look.render(chosen, contents.tokenizer, look.in_colour(colour), ends)


def run(capsys, *arguments):
    """Run the command; return its exit status, output and errors."""
    status = prepare_data.main(["inspect", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_rows_of_different_lengths(folder):
    shown = report(folder / "varied", sequence=1)
    heading, lengths, sequence = shown.split("\n\n")
    assert heading.startswith(f"{folder}/varied/train\ncard: seq len 128, ") and "pad multiple 16" in heading
    assert f"train sequences {ROWS}" in heading.partition("summary.json: rows 8,")[2]
    stored = np.load(folder / "varied/train/lengths.npy").astype(int)
    assert len(set(stored[:, 1])) > 3
    content, padding = stored[:, 0].sum(), (stored[:, 1] - stored[:, 0]).sum()
    assert f"Read all 8 rows: {content} tokens of content, {padding} of padding (" in lengths
    assert "Lengths of rows without padding in tokens: 8, " in lengths and f"longest {stored[:, 0].max()}\n" in lengths
    assert sequence == (
        f"Sequence 1 (of 8), {stored[1, 1]} tokens\n"
        f"[prompt]\n1? \n[response]\n{LINE * 3}{END}\n[padding x {stored[1, 1] - stored[1, 0]}]"
    )
    assert report(folder / "varied/train/", sequence=1 - ROWS) == shown


def test_padding_to_seq_len_begins_after_the_last_response(folder):
    stored = np.load(folder / "varied/train/lengths.npy").astype(int)
    contents = open_contents(folder / "padded")
    assert not contents.card.pad_multiple
    lengths = contents.lengths(1000)
    assert lengths.of == "rows without padding" and lengths.values.tolist() == stored[:, 0].tolist()
    assert lengths.content + lengths.padding == ROWS * SEQ_LEN
    assert text_of(folder / "padded", 3).endswith(f"{END}\n[padding x {SEQ_LEN - stored[3, 0]}]")


def test_packed_documents(folder):
    stored = np.load(folder / "varied/train/lengths.npy").astype(int)
    card = read_card(f"{folder}/packed/train")
    lengths = open_contents(folder / "packed").lengths(1000)
    assert lengths.of == "documents" and sorted(lengths.values) == sorted(stored[:, 0]) and card.most_documents > 1
    seen = []
    for i in range(card.sequences):
        text = text_of(folder / "packed", i)
        documents = re.findall(r"\[document (\d) of (\d), (\d+) tokens\]\n\[prompt\]\n(\d)\? ", text)
        assert [int(number) for number, *_ in documents] == list(range(1, len(documents) + 1))
        assert all(int(of) == len(documents) and int(size) == stored[int(row), 0] for _, of, size, row in documents)
        seen += [row for *_, row in documents] or re.findall(r"^\[prompt\]\n(\d)\? ", text)
    assert sorted(map(int, seen)) == list(range(ROWS))


@pytest.mark.parametrize("colour", ["never", "always"])
def test_text_keeps_its_characters_and_cannot_drive_the_terminal(folder, colour):
    shown = text_of(folder / "packed_text", colour=colour, full=True)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", re.sub(r"\x1b\[\d+m", "", shown))
    assert CJK in shown and SHOWN in shown
    assert shown.count("[end of text]") == 2


def test_a_character_across_a_cut_is_replaced(folder):
    texts = [text_of(folder / "text", i) for i in range(read_card(f"{folder}/text/train").sequences)]
    shown = "".join(text.partition("[text]\n")[2].partition("\n[end")[0] for text in texts)
    assert "�" in shown and "漢字🙂" in shown and not set(shown.partition("sed \\u")[0]) - set(CJK + "�")


def test_a_long_sequence_is_shortened_in_the_middle(folder, monkeypatch):
    monkeypatch.setattr(look, "_ENDS", 10)
    name, contents = folder / "packed", open_contents(folder / "packed")
    sequence = contents.sequence(0)
    content = sequence.content
    first, left_out, last = re.split(r"\n\[(\d+) more tokens\]\n", text_of(name))
    assert int(left_out) == content - 20
    whole = text_of(name, full=True)
    decode = contents.tokenizer.tokenizer.decode
    begin, end = (
        decode(sequence.tokens_L[part].tolist(), skip_special_tokens=False)
        for part in (slice(5, 10), slice(content - 9, content))
    )
    assert "more tokens" not in whole and whole.startswith(first) and first.endswith(begin) and end in last


def test_colours(folder, monkeypatch):
    plain, coloured = (text_of(folder / "varied", 1, colour=colour) for colour in ("never", "always"))
    assert "\x1b" not in plain
    legend, text = coloured.split("\n", 1)
    assert legend == "colours: \x1b[36mprompt\x1b[0m, \x1b[32mresponse\x1b[0m, \x1b[2mpadding\x1b[0m"
    line = "\x1b[32mx = f(y)\x1b[0m\n"
    assert text.startswith(f"\x1b[36m1? \x1b[0m{line * 3}\x1b[32m{END}\x1b[0m\n\x1b[2m[padding x ")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert text_of(folder / "varied", 1, colour="auto") == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert text_of(folder / "varied", 1, colour="auto") == plain


@pytest.mark.parametrize("longest", [1, 2, 17, 131_072])
def test_histogram_fits_a_terminal_and_counts_everything(longest):
    values = np.random.default_rng(0).integers(1, longest, 1_000_000, endpoint=True)
    assert look.histogram(np.array([0, 0])) == [], "such as those of damaged shards"
    lines = look.histogram(values)
    assert len(lines) <= 16 and all(len(line) <= 80 for line in lines)
    rows = [re.match(r" *([\d,]+) - *([\d,]+) (█*) +([\d,]+) ", line).groups() for line in lines]
    bins = [(int(a.replace(",", "")), int(b.replace(",", "")), int(n.replace(",", ""))) for a, b, _, n in rows]
    assert bins[0][0] == values.min() and bins[-1][1] == values.max()
    assert all(n == ((values >= a) & (values <= b)).sum() for a, b, n in bins)
    assert max(len(bar) for *_, bar, _ in rows) == 36


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return an output with ten shards of two rows, each in a subfolder of train/, as merged units are."""
    output = tmp_path_factory.mktemp("shards") / "out"
    shutil.copytree(f"{DEBUG}/tokenizer", output / "tokenizer")
    with ShardWriter(output / "train", Card(64, 512, 1, 0), size_limit=600) as writer:
        for i in range(20):
            writer.write(TrainingSequence(np.full(64, 40 + i, dtype=np.int64), np.ones(64, dtype=np.bool_)))
    index = json.loads((output / "train/index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [2] * 10
    for number, shard in enumerate(index["shards"]):
        name = f"{number:06}-0000/shard.00000.mds"
        (output / "train" / name).parent.mkdir()
        (output / "train" / shard["raw_data"]["basename"]).rename(output / "train" / name)
        shard["raw_data"]["basename"] = name
    (output / "train/index.json").write_text(json.dumps(index))
    return output


@pytest.fixture
def moved(shards, tmp_path):
    return Path(shutil.copytree(shards, tmp_path / "out"))


def test_only_the_shards_that_are_read_are_copied_from_a_url(moved, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    contents = Contents(f"file://{moved}", "train", None, str(scratch))
    assert contents.sequence(-1).tokens_L.tolist() == [59] * 64
    assert len(list(scratch.rglob("*.mds"))) == 1
    assert contents.lengths(1000).rows == 8 and len(list(scratch.rglob("*.mds"))) == 4
    assert contents.lengths(3).rows == 3
    local, remote = report(moved, sequence=-1), report(f"file://{moved}", sequence=-1)
    assert remote == local.replace(str(moved), f"file://{moved}", 1)


def test_an_empty_split_has_a_card_only(folder, capsys):
    status, out, _ = run(capsys, folder / "varied", "--split", "heldout")
    assert status == 0 and "varied/heldout\ncard: " in out and "sequences 0" in out and "Sequence 0" not in out


MISTAKES = {
    "no shards": (lambda out: shutil.rmtree(out / "train"), (), "There are no shards in "),
    "card": (lambda out: (out / "train/memdlm.json").write_text("{"), (), "memdlm.json cannot be read"),
    "counts": (lambda out: (out / "summary.json").write_text("[]"), (), "it is not a JSON object"),
    "no tokenizer": (lambda out: shutil.rmtree(out / "tokenizer"), (), "There is no tokenizer in "),
    "tokenizer": (lambda out: (out / "tokenizer/tokenizer.json").write_text("{"), (), "cannot be loaded"),
    "ids": (
        lambda out: (out / "train/memdlm.json").write_text(json.dumps(vars(Card(64, 512, 2, 0, 20)))), (),
        "have the mask and end-of-text tokens 2 and 0, but the tokenizer 1 and 0",
    ),
    "count": (
        lambda out: (out / "train/memdlm.json").write_text(json.dumps(vars(Card(64, 512, 1, 0, 21)))), (),
        "states 21 sequences, but their index 20",
    ),
    "index": (lambda out: (out / "train/index.json").write_text("{}"), (), "index.json cannot be read"),
    "no shard": (lambda out: (out / "train/000003-0000/shard.00000.mds").unlink(), (), "shard.00000.mds is missing"),
    "size": (lambda out: (out / "train/000000-0000/shard.00000.mds").write_bytes(b""), (), "shard.00000.mds"),
    "bytes": (
        lambda out: overwrite(out / "train/000000-0000/shard.00000.mds"), (), "shard.00000.mds",
    ),
    "sequence": (lambda out: None, ("--sequence", "20"), "There is no sequence 20 in "),
    "negative": (lambda out: None, ("--sequence", "-21"), "(it holds 20); choose one from -20 to 19."),
    "other tokenizer": (lambda out: None, ("--tokenizer", "/nowhere"), "There is no tokenizer in /nowhere"),
}  # fmt: skip


def overwrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")


# A missing shard at a URL is left out, since streaming tries to download it for half a minute.
@pytest.mark.parametrize(
    "mistake, remote", [*product(MISTAKES, [""]), *product(sorted(MISTAKES.keys() - {"no shard"}), ["file://"])]
)
def test_mistakes_are_one_sentence(moved, capsys, mistake, remote):
    damage, options, message = MISTAKES[mistake]
    damage(moved)
    status, out, err = run(capsys, f"{remote}{moved}", *options)
    assert (status, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
