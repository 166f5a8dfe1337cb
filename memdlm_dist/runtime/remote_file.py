"""File at a URL, read in blocks with retries: a store that is away for some seconds does not end a long read."""

import io
from typing import Any

import fsspec

from memdlm_dist.runtime.storage import retrying

BLOCK = 8 << 20  # bytes of one request


class RemoteFile(io.RawIOBase):
    """Seekable file at a URL; wrap it in `io.BufferedReader(file, BLOCK)`.

    Args:
        url: any fsspec URL.
        size: of the file in bytes.
    """

    def __init__(self, url: str, size: int):
        self._url, self._size, self._position = url, size, 0
        self._fs, self._path = fsspec.core.url_to_fs(url)

    def readable(self) -> bool:
        """Return True; `io.BufferedReader` requires it."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it; the next read requests the bytes from there."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes; 0 is the end of the file.

        Raises:
            StoreError: if the store does not answer for `storage.PATIENCE` seconds.
            OSError: if the file is gone, or the store answers with other bytes.
        """
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        data = retrying(lambda: self._fs.cat_file(self._path, start=start, end=end), f"Reading {self._url}")
        if len(data) != end - start:
            raise OSError(f"the store answered with {len(data)} bytes in place of the {end - start} from {start} on")
        buffer[: len(data)] = data
        self._position = end
        return len(data)
