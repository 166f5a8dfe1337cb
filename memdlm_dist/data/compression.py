"""Reading of compressed files; a truncated file raises an error."""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import zstandard

_READ_BYTES = 1 << 13  # compressed bytes per read, which may decompress to 10,000 times as many


@contextlib.contextmanager
def open_bytes(url: str) -> Iterator[io.BufferedReader]:
    """Open a file at any fsspec URL for reading and decompress it according to its suffix.

    Raises:
        OSError, EOFError, or an error of the decompressor: while reading, if the file is damaged or truncated.
    """
    is_zstandard = url.endswith(".zst")
    with fsspec.open(url, "rb", compression=None if is_zstandard else "infer") as raw:
        yield io.BufferedReader(ZstandardReader(raw) if is_zstandard else raw)


class ZstandardReader(io.RawIOBase):
    """Decompressed content of a .zst file with any number of frames.

    zstandard's own reader stops after the first frame, and does not notice a file that ends within a frame.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._decompressor: Any = None  # decompressor of the current frame; None between frames
        self._compressed, self._decompressed = b"", memoryview(b"")

    def readable(self) -> bool:
        """Return True; `io.BufferedReader` requires it."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decompressed bytes and return their number; 0 is the end of the file.

        Raises:
            EOFError: if the file ends within a frame.
        """
        while not self._decompressed:
            chunk = self._compressed or self._file.read(_READ_BYTES)
            if not chunk and self._decompressor is not None:
                raise EOFError("the compressed file ends before its end-of-stream marker")
            if not chunk:
                return 0
            self._decompressor = self._decompressor or zstandard.ZstdDecompressor().decompressobj()
            self._decompressed, self._compressed = memoryview(self._decompressor.decompress(chunk)), b""
            if self._decompressor.eof:
                self._compressed, self._decompressor = self._decompressor.unused_data, None
        size = min(len(buffer), len(self._decompressed))
        buffer[:size], self._decompressed = self._decompressed[:size], self._decompressed[size:]
        return size
