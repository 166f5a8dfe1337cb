"""File access with retries: a folder on disk, or any URL that fsspec knows (s3://, gs://, abfs://, ...)."""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from memdlm_dist.errors import UserError

logger = logging.getLogger()
T = TypeVar("T")

# Seconds for which an operation on a remote store is retried. File systems also retry by themselves (s3fs for about
# half a minute). The other ranks wait in a collective, which times out after comm.train_timeout_seconds.
PATIENCE = 30.0
FIRST_WAIT = 1.0  # seconds before the first retry
# Errors that a retry does not fix.
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError)


class StoreError(OSError):
    """Error of a store that did not answer, or answered with an error, for `PATIENCE` seconds."""


def is_remote(location: str) -> bool:
    """Return whether `location` is a URL, not a path on disk."""
    return "://" in location


def retrying(action: Callable[[], T], description: str) -> T:
    """Return the result of `action`; retry for `PATIENCE` seconds, with waits of 1, 2, 4, ... s between the attempts.

    Args:
        action: raises an error if the store does not answer.
        description: the action for the log, such as "Reading s3://...".

    Raises:
        StoreError: with the last attempt's error as its text and cause. Errors that a retry does not fix, such as a
            missing object or a missing permission, are raised at once and unchanged.
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return action()
        except _PERMANENT:
            raise
        except Exception as error:  # each remote file system has different error classes
            left = began + PATIENCE - time.monotonic()
            if left <= 0:
                raise StoreError(str(error) or type(error).__name__) from error
            wait = min(wait, left)  # the last attempt is at the end
            logger.warning(f"{description} failed ({error}); trying again in {wait:.2g} s.")
            time.sleep(wait)
            wait *= 2


class Storage:
    """Files under one location. Names are relative to the location, with "/" as separator.

    All operations on a URL are retried, and raise a StoreError in the end: see `retrying`.

    Args:
        location: a path or a URL.

    Raises:
        UserError: if fsspec has no file system for the URL, or the file system's package is not installed.
    """

    def __init__(self, location: str):
        self.location = location.rstrip("/")
        self.remote = is_remote(location)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location)
        except ImportError as error:
            hint = "pip install 'memdlm_dist[s3]'" if location.startswith("s3") else "install it"
            raise UserError(f"{location} needs a package that is not installed ({error}); {hint}.") from None
        except ValueError as error:
            raise UserError(f"{location} is not a location that can be opened ({error}); correct the URL.") from None

    def url(self, name: str = "") -> str:
        """Return the full path or URL of `name`, for other libraries."""
        return f"{self.location}/{name}" if name else self.location

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, action: Callable[[], T], name: str) -> T:
        return retrying(action, f"Accessing {self.url(name)}") if self.remote else action()

    def sizes(self, name: str = "") -> dict[str, int | None]:
        """List a folder, not recursively.

        Returns:
            Name -> size in bytes, or None for a subfolder; empty if the folder does not exist.
        """

        def listing() -> dict[str, int | None]:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(name), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return {
                os.path.basename(entry["name"].rstrip("/")): None if entry["type"] == "directory" else entry["size"]
                for entry in entries
            }

        entry_sizes = self._try(listing, name)
        entry_sizes.pop("", None)
        return entry_sizes

    def find(self, name: str = "") -> dict[str, int]:
        """List all files below a folder: path relative to the folder -> size in bytes; empty without the folder."""

        def listing() -> dict[str, int]:
            self._fs.invalidate_cache()
            root = self._path(name).rstrip("/") + "/"
            found = self._fs.find(root, detail=True)
            return {path.removeprefix(root): info["size"] for path, info in found.items() if path != root}

        return self._try(listing, name)

    def exists(self, name: str) -> bool:
        """Return whether a file exists."""

        def look() -> bool:
            self._fs.invalidate_cache()
            try:
                self._fs.info(self._path(name))  # fsspec's own `exists` and `isfile` take any error for an answer
            except FileNotFoundError:
                return False
            return True

        return self._try(look, name)

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        return self._try(lambda: self._fs.cat_file(self._path(name)), name)

    def open(self, name: str) -> Any:
        """Open a file for reading bytes."""
        return self._try(lambda: self._fs.open(self._path(name), "rb"), name)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically; create its parent folders."""
        self._write(name, lambda path: self._fs.pipe_file(path, data))

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file atomically; create its parent folders."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def take(self, source: Path, name: str) -> None:
        """Move a file from the local disk to the location; it appears there as a whole. Create its parent folders."""
        local = "file" in self._fs.protocol
        self._write(name, lambda path: (shutil.move if local else self._fs.put_file)(str(source), path))
        source.unlink(missing_ok=True)

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        def attempt() -> None:
            path = self._path(name)
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            if "file" in self._fs.protocol:  # object stores write each object atomically
                partial = f"{path}.{os.getpid()}.tmp"  # several processes may write the same file
                try:
                    write(partial)
                    os.replace(partial, path)
                except BaseException:
                    Path(partial).unlink(missing_ok=True)
                    raise
            else:
                write(path)

        self._try(attempt, name)

    def create_json(self, name: str, value: Any) -> None:
        """Write a small JSON file unless the file exists; atomic only if the store supports conditional writes."""
        data = (json.dumps(value, indent=2) + "\n").encode()

        def create() -> None:
            self._fs.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                try:
                    self._fs.pipe_file(self._path(name), data, mode="create")
                except (TypeError, NotImplementedError):  # no conditional writes
                    if not self._fs.exists(self._path(name)):
                        self._fs.pipe_file(self._path(name), data)

        self._try(create, name)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the content is not JSON.
        """
        return json.loads(self.read(name))

    def remove(self, name: str, first: str = "") -> None:
        """Remove a file or a folder, if it exists; in a folder, remove the file `first` before all others."""

        def remove() -> None:
            self._fs.invalidate_cache()
            for path, recursive in ((first and self._path(f"{name}/{first}"), False), (self._path(name), True)):
                if path and self._fs.exists(path):
                    self._fs.rm(path, recursive=recursive)

        self._try(remove, name)

    def move(self, name: str, to: str) -> None:
        """Rename a folder; on an object store, which has no rename, copy and remove it."""
        self._try(lambda: self._fs.mv(self._path(name), self._path(to), recursive=True), name)
