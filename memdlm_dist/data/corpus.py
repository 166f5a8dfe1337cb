"""Corpus files: JSONL, JSON and Parquet at any fsspec URL, and a built-in corpus that every machine has."""

import json
import lzma
import re
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from memdlm_dist.data.compression import open_bytes
from memdlm_dist.data.sequences import MAX_ROW
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line

# Errors from reading a file that is damaged or does not match its suffix.
_UNREADABLE = (
    OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, zstandard.ZstdError,
    pyarrow.ArrowException,
)  # fmt: skip
_BOM = b"\xef\xbb\xbf"
# Matches the delimiters in a JSON array, and each string as a whole, so that delimiters within strings are skipped.
# An unterminated string matches up to the end of the content: otherwise the search would restart at each quote in it.
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One row of the corpus, or the reason why it cannot be read."""

    location: str  # `file:number`, counted in lines, array elements or Parquet rows; the file alone if it is one row
    values: dict[str, Any]
    problem: str | None = None  # reason why the row cannot be read; `values` is then empty


@dataclass(frozen=True)
class Source:
    """One file of the corpus, for progress reports."""

    url: str
    size: int  # bytes as stored; 0 if the file system does not report it


def sources(patterns: Sequence[str]) -> list[Source]:
    """Find the files that paths, URLs and glob patterns match, in a fixed order.

    A folder matches the JSONL, JSON and Parquet files below it.

    Raises:
        UserError: if a pattern matches no file or cannot be accessed, or a file has another format.
    """
    matches: list[Source] = []
    for pattern in patterns:
        try:
            filesystem, path = fsspec.core.url_to_fs(pattern)
            if "data" in filesystem.protocol:
                raise ValueError("a data: URL names no file")
            if filesystem.isfile(path):  # an existing file, even if its name looks like a pattern
                names = [path]
            elif filesystem.isdir(path):
                names = [n for n in sorted(filesystem.find(path)) if _kind(n) is not None]
            else:
                names = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
                names = [name for name in names if filesystem.isfile(name)]
            sizes = [filesystem.size(name) or 0 for name in names]
        except Exception as error:  # each remote file system has different error classes
            raise UserError(f"The input {pattern} cannot be accessed ({one_line(error)}); correct --input.") from None
        if not names:
            raise UserError(
                f"The input {pattern} matches no file; give JSONL or Parquet files, a folder, or a pattern."
            )
        local = "file" in filesystem.protocol
        urls = names if local else [filesystem.unstrip_protocol(name) for name in names]
        matches += [Source(url, size) for url, size in zip(urls, sizes, strict=True)]
    for source in matches:
        if _kind(source.url) is None:
            raise UserError(
                f"The input {source.url} is neither .jsonl, .json nor .parquet (compressed or not); convert it to "
                "one of these formats."
            )
    return matches


def _kind(url: str) -> str | None:
    suffixes = Path(url).suffixes[-2:]
    for kind, endings in {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}.items():
        if any(suffix in endings for suffix in suffixes):
            return kind
    return None


def rows(source: Source) -> Iterator[Row]:
    """Yield the rows of one file; a bad row has a `problem` and no values.

    Raises:
        UserError: if the file cannot be read.
    """
    reader = _parquet_rows if _kind(source.url) == "parquet" else _json_rows
    try:
        yield from reader(source.url)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"The input {source.url} cannot be read ({one_line(error)}); replace it, or leave it out of --input."
        ) from None


def _json_rows(url: str) -> Iterator[Row]:
    with open_bytes(url) as file:
        head = file.peek(4)[:4]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
            raise UserError(f"The input {url} is not UTF-8 but UTF-16 or UTF-32; convert it to UTF-8.")
        if head.startswith(_BOM):
            file.read(len(_BOM))
        lines = _json_file_rows(file.read(), url) if ".json" in Path(url).suffixes else _lines(file)
        for number, line in enumerate(lines, start=1):
            if line is None or len(line) > MAX_ROW:
                yield Row(f"{url}:{number}", {}, f"longer than {MAX_ROW:,} bytes")
            elif line.strip():
                yield _json_row(f"{url}:{number}", line)


def _json_row(location: str, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except RecursionError:
        return Row(location, {}, "nested too deeply")
    except ValueError as error:  # also raised by a number with thousands of digits
        return Row(location, {}, f"not valid JSON ({one_line(error)})")
    if not isinstance(values, dict):
        return Row(location, {}, f"a JSON {type(values).__name__}, not an object")
    return Row(location, values)


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Yield the lines of a file; None stands for a line longer than `MAX_ROW` bytes."""
    while line := file.readline(MAX_ROW + 1):
        if len(line) <= MAX_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW)
        yield None


def _json_file_rows(content: bytes, url: str) -> Iterator[bytes]:
    """Yield the rows of a .json file: the elements of its array, its one object, or its lines.

    Alpaca and similar data sets are one array, so the file is read into memory as a whole.
    """
    if content.lstrip().startswith(b"["):
        yield from _array_elements(content, url)
    elif _json_row("", content).problem is None:
        yield content
    else:
        yield from content.splitlines()


def _array_elements(content: bytes, url: str) -> Iterator[bytes]:
    """Yield the elements of a JSON array as unparsed bytes, so that an invalid element is one bad row.

    Raises:
        UserError: if the array has no end, or other content follows it.
    """
    depth = start = 0
    for match in _STRUCTURE.finditer(content):
        delimiter = match.group()
        depth += (delimiter in (b"[", b"{")) - (delimiter in (b"]", b"}"))
        if depth == 0 or (depth == 1 and delimiter == b","):
            yield content[start : match.start()]
        if depth == 0:
            if content[match.end() :].strip():
                raise UserError(f"The input {url} is not valid JSON: other content follows the array; remove it.")
            return
        if start == 0 or (depth == 1 and delimiter == b","):
            start = match.end()
    raise UserError(f"The input {url} is not valid JSON: the array has no end; replace the file if it is truncated.")


def _parquet_rows(url: str) -> Iterator[Row]:
    with fsspec.open(url, "rb") as file:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for values in _parquet_values(batch):
                number += 1
                location = f"{url}:{number}"
                yield Row(location, {}, values) if isinstance(values, str) else Row(location, values)


def _parquet_values(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch; a row that cannot be read is yielded as the text of its error."""
    try:
        yield from batch.to_pylist()
    except Exception as error:  # such as text that is not UTF-8, or a date outside of Python's range
        if len(batch) == 1:
            yield one_line(error)
            return
        for row in range(len(batch)):
            yield from _parquet_values(batch.slice(row, 1))


def builtin_sources() -> list[Source]:
    """Find the Python standard library's source files: long real documents that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        # Installed packages differ from machine to machine; the library's tests contain unusual encodings.
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts)
    ]
    return [Source(str(path), path.stat().st_size) for path in files]


def builtin_rows(source: Source) -> Iterator[Row]:
    """Yield one file of the built-in corpus as one document, with the key "text"."""
    try:
        text = Path(source.url).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Row(source.url, {}, f"not readable as UTF-8 ({one_line(error)})")
        return
    if text.strip():
        yield Row(source.url, {"text": text})


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether the row with this key belongs to the held-out split; equal keys give equal answers."""
    return zlib.crc32(key.encode()) / 2**32 < fraction
