"""Units of a corpus hold each of its rows once, in order, wherever the files are cut."""

import bz2
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from memdlm_dist.data import corpus
from memdlm_dist.data.corpus import Segment, Source
from memdlm_dist.data.hub_dataset import HubSource
from memdlm_dist.data.preparation import units
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.units import Unit
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.hub import Repository

COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
BOM = b"\xef\xbb\xbf"
TEXTS = st.text(st.sampled_from('aé€😀 "\\\t\u2028\x85'), max_size=12)
LINES = st.one_of(
    TEXTS.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.sampled_from([b"", b" \t", b"\r", b"{", b"[1]", b'{"text": "\xff"}', b'{"text": "\xf0\x9f"}', b"null"]),
    st.integers(30, 90).map(lambda n: json.dumps({"text": "x" * n}).encode()),
)
CONTENTS = st.builds(
    lambda head, lines, end, last: head + end.join(lines) + last,
    st.sampled_from([b"", BOM]), st.lists(LINES, max_size=8), st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]),
)  # fmt: skip
FAST = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def write(folder: Path, name: str, content: bytes) -> Source:
    path = folder / name
    path.write_bytes(content)
    return corpus.sources([str(path)])[0]


def contents(rows):
    """Return what the rows hold; the location and the text of a problem depend on the unit."""
    return [None if row.problem is not None else row.values for row in rows]


def of_units(cut, skip=0):
    return [row for unit in cut for row, _ in units.rows(unit, skip)]


def naive(content, max_row):
    """Return the rows of a JSONL file, read line by line; None for a bad one."""
    found = []
    for line in io.BytesIO(content.removeprefix(BOM)):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
        except ValueError:
            values = None
        found.append(values if isinstance(values, dict) and len(line) <= max_row else None)
    return found


# Rows of JSONL files.


@FAST
@given(CONTENTS, st.integers(1, 120))
@example(BOM + b'{"text": "a"}\n', 1)
@example(BOM + b'{"text": "a"}\n', 3)
@example(BOM, 1)
@example(b'{"text": "a"}\n{"text": "b"}\n', 14)  # the border is exactly between two rows
@example(b'{"text": "a"}\n{"text": "b"}\n', 13)  # the border is at the line's end
def test_units_hold_every_row_once(tmp_path, monkeypatch, content, unit_size):
    monkeypatch.setattr(corpus, "MAX_ROW", 64)
    file = write(tmp_path, "rows.jsonl", content)
    cut = units.cut([file], unit_size)
    assert sum(unit.size for unit in cut) == len(content)
    expected = naive(content, 64)
    assert contents(corpus.rows(Segment(file, file.size))) == expected
    assert contents(of_units(cut)) == expected
    for unit in cut:
        offsets = [offset for _, offset in units.rows(unit)]
        assert offsets == sorted(offsets) and all(0 <= offset <= unit.size for offset in offsets)


def test_rows_of_later_units_are_named_by_their_byte(tmp_path):
    file = write(tmp_path, "rows.jsonl", b'{"text": "a"}\n' * 3 + b"bad\n" + b'{"text": "b"}\n')
    bad = [row for row in of_units(units.cut([file], 30)) if row.problem]
    assert [row.location for row in bad] == [f"{file.url}:byte 43"], "counted from 1, as `tail -c +43` does"
    assert [row.location for row in of_units(units.cut([file], 100)) if row.problem] == [f"{file.url}:4"]


# Units.


def test_consecutive_small_files_share_a_unit(tmp_path):
    sizes = [10, 20, 30, 25, 65, 200, 40, 40]
    files = [write(tmp_path, f"{i}.jsonl", b" " * (size - 1) + b"\n") for i, size in enumerate(sizes)]
    cut = units.cut(files, 64)
    whole = [[os.path.basename(s.source.url)[0] for s in unit.segments] for unit in cut]
    assert whole == [list("012"), ["3"], ["4"], ["4"], ["5"], ["5"], ["5"], ["5"], ["6"], ["7"]]
    assert [unit.number for unit in cut] == list(range(10))
    assert [(s.start, s.end) for unit in cut[2:4] for s in unit.segments] == [(0, 64), (64, 65)]


def test_units_depend_on_the_files_and_the_size_alone(tmp_path):
    content = b'{"text": "row"}\n' * 20
    files = [write(tmp_path, f"{i}.jsonl", content) for i in range(2)]
    before = units.cut(files, 50)
    for file in files:  # the same size: neither the content nor the time of the last change moves a border
        Path(file.url).write_bytes(content.replace(b"row", b"cow"))
    assert [unit.segments for unit in before] == [
        tuple(Segment(files[i], s.size, s.start, s.end) for i, s in [(files.index(s.source), s) for s in unit.segments])
        for unit in units.cut([Source(file.url, file.size, file.version) for file in files], 50)
    ]
    prefix = units.cut(files[:1], 50)
    assert before[: len(prefix)] == prefix, "files that follow do not change the units of a large file"


def test_compressed_and_json_files_are_streams_of_one_segment(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(20)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    files = [write(tmp_path, f"rows.jsonl.{suffix}", compress(lines)) for suffix, compress in COMPRESSIONS.items()]
    files += [write(tmp_path, "array.json", json.dumps(rows).encode()), write(tmp_path, "lines.json", lines)]
    for file in files:
        (unit,) = units.cut([file], 10)
        assert unit.is_stream and len(unit.segments) == 1, file
        assert contents(of_units([unit])) == rows
        for skip in (1, 7, 20, 21):
            assert contents(row for row, _ in units.rows(unit, skip)) == rows[skip:]
    plain = write(tmp_path, "rows.jsonl", lines)
    assert not any(unit.is_stream for unit in units.cut([plain], 10))
    assert not units.cut([plain], 10_000)[0].is_stream


def test_a_resumed_unit_gives_the_rest_of_all_its_files(tmp_path):
    lines = [json.dumps({"text": f"{i}"}).encode() + b"\n\n" for i in range(12)]
    table = pyarrow.table({"text": [f"t{i}" for i in range(5)]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    files = [
        write(tmp_path, "a.jsonl", b"bad\n" + b"".join(lines[:4])),
        write(tmp_path, "b.jsonl.gz", gzip.compress(b"".join(lines[4:]))),
        *corpus.sources([str(tmp_path / "c.parquet")]),
        write(tmp_path, "d.jsonl", lines[0]),
    ]
    (unit,) = units.cut(files, 1 << 20)
    assert unit.is_stream and len(unit.segments) == 4
    rows = contents(row for row, _ in units.rows(unit))
    assert len(rows) == 1 + 12 + 5 + 1
    for skip in range(len(rows) + 2):
        assert contents(row for row, _ in units.rows(unit, skip)) == rows[skip:], skip


@settings(FAST, max_examples=20)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 5000))
def test_parquet_is_cut_between_row_groups(tmp_path, n_rows, group, unit_size):
    path = tmp_path / "rows.parquet"
    column = [f"row {i} " * 30 for i in range(n_rows)]
    values = [text.encode() if i % 7 else b"\xff" for i, text in enumerate(column)]
    table = pyarrow.table({"text": pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    files = corpus.sources([str(path)])
    cut = units.cut(files, unit_size)
    assert abs(sum(unit.size for unit in cut) - files[0].size) < len(cut), "stored bytes, rounded"
    rows = of_units(cut)
    assert [row.location for row in rows] == [f"{path}:{i + 1}" for i in range(n_rows)]
    assert contents(rows) == [{"text": text} if i % 7 else None for i, text in enumerate(column)]
    if len(cut) > 1:
        sizes = corpus.row_group_sizes(files[0])
        borders = [(s.start, s.end) for unit in cut for s in unit.segments]
        assert [start for start, _ in borders] == [0, *[end for _, end in borders[:-1]]]
        assert all(sum(sizes[start:end]) >= unit_size for start, end in borders[:-1])
        assert all(sum(sizes[start : end - 1]) < unit_size for start, end in borders)


def test_files_of_unknown_size_are_streams(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 9)
    (unit,) = units.cut([Source(str(path), None, "")], 10)
    assert unit.is_stream and unit.segments[0].end is None
    assert len(list(corpus.rows(unit.segments[0]))) == 9


def test_the_whole_corpus_is_one_unit(tmp_path):
    files = [write(tmp_path, f"{i}.jsonl", b'{"text": "a"}\n' * 9) for i in range(3)]
    (unit,) = units.whole(files)
    assert len(of_units([unit])) == 27 and [s.source for s in unit.segments] == files
    assert str(unit) == f"0 ({files[0].url} to {files[2].url})" and str(Unit(1, unit.segments[:1])).endswith("0.jsonl)")


# Changed files.


def changed(path):
    path.write_bytes(b'{"text": "another"}\n' * 3)


def touched(path):
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change, words", [
    (changed, "has changed since the preparation began (28 bytes, version"),
    (touched, "has changed since the preparation began (28 bytes, version"),
    (Path.unlink, "is gone since the preparation began; restore it."),
])  # fmt: skip
def test_a_file_that_has_changed_is_noticed_before_and_after_it_is_read(tmp_path, change, words):
    path = tmp_path / "rows.jsonl"
    file = write(tmp_path, "rows.jsonl", b'{"text": "a"}\n' * 2)
    (unit,) = units.cut([file], 1000)
    rows = units.rows(unit)
    assert next(rows)[0].values == {"text": "a"}
    change(path)
    with pytest.raises(UserError) as after:
        list(rows)
    with pytest.raises(UserError) as before:
        list(units.rows(unit))
    for error in (after, before):
        assert str(error.value).startswith(f"The input {path} {words}") and str(error.value).endswith(".")


def test_a_dataset_without_rows_is_one_unit():
    empty = HubSource("org/name[train]", 0, "commit", datasets.Dataset.from_dict({"text": []}), Repository("org/name"))
    (unit,) = units.cut([empty], 1 << 20)
    assert list(units.rows(unit)) == []


def test_empty_files_share_a_unit_with_their_neighbours(tmp_path):
    files = [write(tmp_path, f"{i}.jsonl", b'{"text": "a"}\n' * (i % 2)) for i in range(20)]
    assert len(units.cut(files, 1 << 20)) == 1
    with pytest.raises(UserError, match=r"--unit-size 1 would cut the 20,000,000 bytes of the input into more than "):
        units.cut([Source("rows.jsonl", 20_000_000, "")], 1)


def test_the_files_of_an_output_are_no_input(tmp_path):
    names = ("train/index.json", "train.partial/memdlm_files.json", "memdlm_units/a/plan.json", "summary.json")
    for name in names:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    kept = [write(tmp_path / "out", name, b'{"text": "a"}\n') for name in ("rows.jsonl", "training.json")]
    config = PrepareConfig(tmp_path / "out", 8, inputs=(str(tmp_path),))
    assert [Path(file.url).name for file in units.sources(config)] == [Path(file.url).name for file in kept]
