"""Compressed files opened so that their end is the end of what was written: a file cut short is an error."""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import zstandard

_READ = 1 << 13  # compressed bytes at once: what they stand for may be 10,000 times as long


@contextlib.contextmanager
def open_bytes(url: str) -> Iterator[io.BufferedReader]:
    """Open a file at any fsspec URL for reading, decompressed by its suffix.

    Raises:
        OSError, EOFError, and those of the decompressors: while reading, if the file is damaged or not complete.
    """
    frames = url.endswith(".zst")
    with fsspec.open(url, "rb", compression=None if frames else "infer") as raw:
        yield io.BufferedReader(ZstandardReader(raw) if frames else raw)


class ZstandardReader(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    zstandard's own reader ends after the first frame, and takes the end of the file for the end of a frame.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._frame: Any = None  # its decompressor, within a frame
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            chunk = self._compressed or self._file.read(_READ)
            if not chunk and self._frame is not None:
                raise EOFError("the compressed file ends before its end-of-stream marker")
            if not chunk:
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content, self._compressed = memoryview(self._frame.decompress(chunk)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size
