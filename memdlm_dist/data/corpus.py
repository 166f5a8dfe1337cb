"""Corpus files: JSONL, JSON and Parquet at any fsspec URL, and a built-in corpus that every machine has."""

import io
import json
import lzma
import re
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from memdlm_dist.data.compression import is_compressed, open_bytes
from memdlm_dist.data.sequences import MAX_ROW
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import StoreError, retrying

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

    # `file:number`, counted in lines, array elements or Parquet rows; `file:byte N` in a later part of a JSONL file;
    # the file alone if it is one row.
    location: str
    values: dict[str, Any]
    problem: str | None = None  # reason why the row cannot be read; `values` is then empty
    size: int = 0  # bytes of the row's JSON
    offset: int = 0  # stored bytes of the segment that have been read


_SKIPPED = Row("", {})


@dataclass(frozen=True)
class Source:
    """One file of the corpus.

    Attributes:
        url: path or URL.
        size: bytes as stored; None if the file system does not report it.
        version: changes with the content: the store's ETag or checksum, else the time of the last change.
    """

    url: str
    size: int | None
    version: str


@dataclass(frozen=True)
class Segment:
    """Part of a source.

    Attributes:
        size: bytes as stored, for progress reports.
        start, end: bytes of an uncompressed JSONL file (the rows that begin in this range), row groups of a Parquet
            file, or rows of a dataset of the hub. `end` is None for a whole file.
    """

    source: Source
    size: int
    start: int = 0
    end: int | None = None

    @property
    def is_stream(self) -> bool:
        """True if the length of the text is not known before it is read: a compressed file, or one JSON array."""
        url = self.source.url
        return _kind(url) == "jsonl" and self.end is None and (self.source.size is None or not can_be_cut(self.source))


def can_be_cut(source: Source) -> bool:
    """Return whether ranges of bytes of a JSONL file can be read: it is neither compressed nor one JSON value."""
    return _kind(source.url) == "jsonl" and not is_compressed(source.url) and ".json" not in Path(source.url).suffixes


def sources(patterns: Sequence[str]) -> list[Source]:
    """Find the files that paths, URLs and glob patterns match, in a fixed order.

    A folder matches the JSONL, JSON and Parquet files below it.

    Raises:
        UserError: if a pattern matches no file or cannot be accessed, or a file has another format.
    """
    matches: list[Source] = []
    for pattern in patterns:
        try:
            found = _matching(pattern)
        except Exception as error:  # each remote file system has different error classes
            raise UserError(f"The input {pattern} cannot be accessed ({one_line(error)}); correct --input.") from None
        if not found:
            raise UserError(
                f"The input {pattern} matches no file; give JSONL or Parquet files, a folder, or a pattern."
            )
        matches += found
    for source in matches:
        if _kind(source.url) is None:
            raise UserError(
                f"The input {source.url} is neither .jsonl, .json nor .parquet (compressed or not); convert it to "
                "one of these formats."
            )
    return matches


def _matching(pattern: str) -> list[Source]:
    filesystem, path = fsspec.core.url_to_fs(pattern)
    if "data" in filesystem.protocol:
        raise ValueError("a data: URL names no file")
    if filesystem.isfile(path):  # an existing file, even if its name looks like a pattern
        found = {path: filesystem.info(path)}
    elif filesystem.isdir(path):
        found = {name: info for name, info in filesystem.find(path, detail=True).items() if _kind(name) is not None}
    else:
        found = filesystem.glob(path, detail=True) if any(c in path for c in "*?[") else {}
    local = "file" in filesystem.protocol
    names = [name for name, info in sorted(found.items()) if (Path(name).is_file() if local else _is_file(info))]
    # The listing of a folder on disk describes links, not their targets; other listings may lack sizes or versions.
    complete = {name for name in names if not local and found[name].get("size") and _CHECKSUMS & found[name].keys()}
    infos = [found[name] if name in complete else filesystem.info(name) for name in names]
    return [
        Source(name if local else filesystem.unstrip_protocol(name), info.get("size"), _version(info))
        for name, info in zip(names, infos, strict=True)
    ]


# Keys of a file's description in the file systems of fsspec.
_CHECKSUMS = {"ETag", "etag", "md5Hash", "content_md5"}
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def _is_file(info: dict[str, Any]) -> bool:
    return info.get("type") == "file"


def _version(info: dict[str, Any]) -> str:
    keys = (*sorted(_CHECKSUMS), *_TIMES)
    return next((str(info[key]).strip('"') for key in keys if info.get(key) is not None), "")


def check_unchanged(source: Source) -> None:
    """Check that a file still has the size and version that the preparation began with.

    Raises:
        UserError: if it has changed or is gone.
    """
    filesystem, path = fsspec.core.url_to_fs(source.url)
    try:
        filesystem.invalidate_cache()
        info = retrying(lambda: filesystem.info(path), f"Looking at {source.url}")
    except FileNotFoundError:
        raise UserError(f"The input {source.url} is gone since the preparation began; restore it.") from None
    except StoreError as error:
        raise _unanswered(source.url, error) from None
    except Exception as error:  # each remote file system has different error classes
        raise UserError(f"The input {source.url} cannot be accessed ({one_line(error)}); correct --input.") from None
    size, version = info.get("size"), _version(info)
    require(
        (size, version) == (source.size, source.version),
        f"The input {source.url} has changed since the preparation began ({source.size} bytes, version "
        f"{source.version or 'unknown'}; now {size} bytes, version {version or 'unknown'}); restore it, or prepare "
        "the data anew with --overwrite.",
    )


def _unanswered(url: str, error: StoreError) -> UserError:
    return UserError(
        f"The store of the input {url} does not answer ({one_line(error)}); check the store or the connection. "
        "Finished units are kept: the same command goes on from there."
    )


def _kind(url: str) -> str | None:
    suffixes = Path(url).suffixes[-2:]
    for kind, endings in {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}.items():
        if any(suffix in endings for suffix in suffixes):
            return kind
    return None


def rows(segment: Segment, skip: int = 0) -> Iterator[Row]:
    """Yield the rows of a segment; a bad row has a `problem` and no values.

    Args:
        skip: number of rows at the beginning that are not needed; JSON rows among them are not parsed.

    Raises:
        UserError: if the file cannot be read.
    """
    url = segment.source.url
    reader = {"parquet": _parquet_rows, "jsonl": _json_rows, None: _builtin_rows}[_kind(url)]
    try:
        yield from reader(segment, skip)
    except UserError:
        raise
    except StoreError as error:
        raise _unanswered(url, error) from None
    except _UNREADABLE as error:
        raise UserError(
            f"The input {url} cannot be read ({one_line(error)}); replace it, or leave it out of --input."
        ) from None


def _json_rows(segment: Segment, skip: int) -> Iterator[Row]:
    url, is_array = segment.source.url, ".json" in Path(segment.source.url).suffixes
    with open_bytes(url, segment.source.size or 0) as (raw, file):
        end = segment.end
        # A byte order mark counts as a part of the first line, which begins at 0 even in a very short segment.
        position, mark = (_seek_line(file, segment.start, end), 0) if segment.start else (0, _skip_bom(file, url))
        lines = _json_file_rows(file.read(), url) if is_array else _lines(file)
        for number, (line, size) in enumerate(lines, start=1):
            begin, position = position, position + size + (mark if number == 1 else 0)
            if end is not None and begin >= end:
                return
            if line is not None and not line.strip():
                continue
            if skip:
                skip -= 1
                yield _SKIPPED
                continue
            location = f"{url}:{number}" if not segment.start else f"{url}:byte {begin + 1}"
            offset = min(raw.tell() if segment.is_stream else position - segment.start, segment.size)
            if line is None or len(line) > MAX_ROW:
                yield Row(location, {}, f"longer than {MAX_ROW:,} bytes", size, offset)
            else:
                yield replace(_json_row(location, line), size=size, offset=offset)


def _skip_bom(file: io.BufferedReader, url: str) -> int:
    """Skip the byte order mark at the beginning of a file, and return its size.

    Raises:
        UserError: if the file is not UTF-8.
    """
    head = file.peek(4)[:4]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        raise UserError(f"The input {url} is not UTF-8 but UTF-16 or UTF-32; convert it to UTF-8.")
    return len(file.read(len(_BOM))) if head.startswith(_BOM) else 0


def _seek_line(file: io.BufferedReader, start: int, end: int | None) -> int:
    """Move to the first line that begins at `start` or later, and return its position; at most just past `end`."""
    file.seek(start - 1)
    position = start - 1
    while line := file.readline(MAX_ROW):
        position += len(line)
        if line.endswith(b"\n") or (end is not None and position >= end):
            break
    return position


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


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """Yield the lines of a file and their sizes; None stands for a line longer than `MAX_ROW` bytes."""
    while line := file.readline(MAX_ROW + 1):
        size = len(line)
        if size <= MAX_ROW:
            yield line, size
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW)
            size += len(line)
        yield None, size


def _json_file_rows(content: bytes, url: str) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a .json file and their sizes: the elements of its array, its one object, or its lines.

    Alpaca and similar data sets are one array, so the file is read into memory as a whole.
    """
    if content.lstrip().startswith(b"["):
        found: Iterable[bytes] = _array_elements(content, url)
    else:
        found = [content] if _json_row("", content).problem is None else content.splitlines()
    for row in found:
        yield row, len(row)


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


def _parquet_rows(segment: Segment, skip: int) -> Iterator[Row]:
    del skip
    url = segment.source.url
    with open_bytes(url, segment.source.size or 0) as (raw, _):
        file = pyarrow.parquet.ParquetFile(raw)
        groups = range(segment.start, file.num_row_groups if segment.end is None else segment.end)
        before = sum(file.metadata.row_group(i).num_rows for i in range(segment.start))
        total = max(sum(file.metadata.row_group(i).num_rows for i in groups), 1)
        done = 0
        for batch in file.iter_batches(batch_size=1024, row_groups=list(groups)):
            for values in _parquet_values(batch):
                done += 1
                location, offset = f"{url}:{before + done}", segment.size * done // total
                if isinstance(values, str):
                    yield Row(location, {}, values, offset=offset)
                else:
                    yield Row(location, values, offset=offset)


def row_group_sizes(source: Source) -> list[int]:
    """Return the bytes of each row group of a Parquet file, uncompressed.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        with open_bytes(source.url, source.size or 0) as (raw, _):
            metadata = pyarrow.parquet.ParquetFile(raw).metadata
            return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except _UNREADABLE as error:
        raise UserError(
            f"The input {source.url} cannot be read ({one_line(error)}); replace it, or leave it out of --input."
        ) from None


def is_parquet(source: Source) -> bool:
    """Return whether a file is a Parquet file, according to its suffix."""
    return _kind(source.url) == "parquet"


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
    return [Source(str(path), path.stat().st_size, str(path.stat().st_mtime)) for path in files]


def _builtin_rows(segment: Segment, skip: int) -> Iterator[Row]:
    del skip
    yield from builtin_rows(segment.source)


def builtin_rows(source: Source) -> Iterator[Row]:
    """Yield one file of the built-in corpus as one document, with the key "text"."""
    try:
        text = Path(source.url).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Row(source.url, {}, f"not readable as UTF-8 ({one_line(error)})", offset=source.size or 0)
        return
    if text.strip():
        yield Row(source.url, {"text": text}, offset=source.size or 0)


def is_held_out(key: str, fraction: float) -> bool:
    """Return whether the row with this key belongs to the held-out split; equal keys give equal answers."""
    return zlib.crc32(key.encode()) / 2**32 < fraction
