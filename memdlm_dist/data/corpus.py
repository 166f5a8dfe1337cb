"""Where text comes from: JSONL, JSON and Parquet files at any fsspec URL, and a corpus every machine has."""

import io
import json
import lzma
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from memdlm_dist.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of the corpus and where it stands, `file:line` (or element); `problem` says why it cannot be read."""

    location: str
    values: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """One file of the corpus, for progress reports."""

    url: str
    size: int  # bytes as stored, 0 if the file system does not tell


def sources(patterns: Sequence[str]) -> list[Source]:
    """The files that paths, URLs and glob patterns stand for, in a fixed order.

    A folder stands for the JSONL and Parquet files below it.

    Raises:
        UserError: for a pattern that matches nothing or cannot be reached.
    """
    found: list[Source] = []
    for pattern in patterns:
        try:
            filesystem, path = fsspec.core.url_to_fs(pattern)
            if filesystem.isdir(path):
                names = [n for n in sorted(filesystem.find(path)) if _kind(n) is not None]
            else:
                names = sorted(filesystem.glob(path)) if any(c in path for c in "*?[") else [path]
                names = [name for name in names if filesystem.isfile(name)]
            sizes = [filesystem.size(name) or 0 for name in names]
        except Exception as error:  # every remote file system raises its own
            raise UserError(f"The input {pattern} cannot be reached: {error}.") from None
        if not names:
            raise UserError(
                f"The input {pattern} matches no file; give JSONL or Parquet files, a folder, or a pattern."
            )
        local = "file" in filesystem.protocol
        urls = names if local else [filesystem.unstrip_protocol(name) for name in names]
        found += [Source(url, size) for url, size in zip(urls, sizes, strict=True)]
    for source in found:
        if _kind(source.url) is None:
            raise UserError(f"The input {source.url} is neither .jsonl, .json nor .parquet (compressed or not).")
    return found


def _kind(url: str) -> str | None:
    suffixes = Path(url).suffixes[-2:]
    for kind, endings in {"jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}.items():
        if any(suffix in endings for suffix in suffixes):
            return kind
    return None


def rows(source: Source) -> Iterator[Row]:
    """The rows of one file; a bad one comes with its `problem` instead of its values.

    Raises:
        UserError: if the file as a whole cannot be read.
    """
    reader = _parquet_rows if _kind(source.url) == "parquet" else _jsonl_rows
    try:
        yield from reader(source.url)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise UserError(f"The input {source.url} cannot be read: {error}.") from None


def _jsonl_rows(url: str) -> Iterator[Row]:
    with fsspec.open(url, "rb", compression="infer") as raw:
        # zstandard's reader cannot be read by lines; a buffer around it, and around any other, can.
        file = io.BufferedReader(raw)
        lines = _array_elements(file, url) if ".json" in Path(url).suffixes else file
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            location = f"{url}:{number}"
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield Row(location, {}, f"not valid JSON ({error})")
                continue
            if isinstance(values, dict):
                yield Row(location, values)
            else:
                yield Row(location, {}, f"a JSON {type(values).__name__}, not an object")


def _array_elements(file: IO[bytes], url: str) -> Iterable[bytes]:
    """The lines of a .json file that holds JSONL, or the elements of the one array that it holds.

    Alpaca and its relatives come as one array; it is read as a whole.
    """
    content = file.read()
    if not content.lstrip().startswith(b"["):
        return content.splitlines()
    try:
        elements = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The input {url} is not valid JSON: {error}.") from None
    return [json.dumps(element).encode() for element in elements]


def _parquet_rows(url: str) -> Iterator[Row]:
    with fsspec.open(url, "rb") as file:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{url}:{number}", values)


def builtin_sources() -> list[Source]:
    """The Python standard library's source files: long real documents that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        # Installed packages differ from machine to machine; the library's own tests hold odd encodings.
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts)
    ]
    return [Source(str(path), path.stat().st_size) for path in files]


def builtin_rows(source: Source) -> Iterator[Row]:
    """One file of the built-in corpus as one document under "text"."""
    try:
        text = Path(source.url).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        yield Row(source.url, {}, f"not readable as UTF-8 ({error})")
        return
    if text.strip():
        yield Row(source.url, {"text": text})


def is_held_out(key: str, fraction: float) -> bool:
    """Whether what `key` stands for belongs to the held-out part; a function of the key alone."""
    return zlib.crc32(key.encode()) / 2**32 < fraction
