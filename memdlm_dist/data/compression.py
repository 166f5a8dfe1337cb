"""Reading of compressed files; a truncated file raises an error."""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import zstandard
from fsspec.utils import infer_compression

from memdlm_dist.runtime.remote_file import BLOCK, RemoteFile
from memdlm_dist.runtime.storage import is_remote

_READ_BYTES = 1 << 13  # compressed bytes per read, which may decompress to 10,000 times as many


@contextlib.contextmanager
def open_bytes(url: str, size: int = 0) -> Iterator[tuple[IO[bytes], io.BufferedReader]]:
    """Open a file at any fsspec URL for reading and decompress it according to its suffix.

    Args:
        size: of the stored file in bytes; 0 if unknown. Reads from a URL of known size are retried.

    Returns:
        The file as stored, whose position tells the progress, and its decompressed content.

    Raises:
        OSError, EOFError, or an error of the decompressor: while reading, if the file is damaged or truncated.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(url) and size:
            raw: Any = stack.enter_context(io.BufferedReader(RemoteFile(url, size), BLOCK))
        else:
            raw = stack.enter_context(fsspec.open(url, "rb"))
        if url.endswith(".zst"):
            yield raw, io.BufferedReader(ZstandardReader(raw))
        elif name := infer_compression(url):
            content = fsspec.compression.compr[name](raw, mode="r")
            yield raw, content if hasattr(content, "peek") else io.BufferedReader(content)
        else:
            yield raw, raw if hasattr(raw, "peek") else io.BufferedReader(raw)


def is_compressed(url: str) -> bool:
    """Return whether a file is compressed, according to its suffix."""
    return url.endswith(".zst") or infer_compression(url) is not None


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
