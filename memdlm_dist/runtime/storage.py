"""A folder on disk or at any URL that fsspec knows (s3://, gs://, abfs://, ...), and patience with remote ones."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from memdlm_dist.errors import UserError

logger = logging.getLogger()
T = TypeVar("T")

# Seconds that a store may be away. File systems retry by themselves too (s3fs for some half a minute), and the other
# ranks wait meanwhile, comm.train_timeout_seconds at most.
PATIENCE = 30.0
FIRST_WAIT = 1.0
# Errors that another attempt will not mend.
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ImportError)


def is_remote(location: str) -> bool:
    return "://" in location


def retrying(action: Callable[[], T], what: str) -> T:
    """The result of `action`, tried for `PATIENCE` seconds with waits of 1, 2, 4, ... s between.

    Args:
        action: raises while the store does not answer.
        what: what it does, for the log: "reading s3://...".

    Raises:
        Exception: of the last attempt, or at once one that says that the object is not there or not allowed.
    """
    began, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            return action()
        except _LASTING:
            raise
        except Exception as error:  # every remote file system raises its own
            if time.monotonic() + wait - began > PATIENCE:
                raise
            logger.warning(f"{what} failed ({error}); trying again in {wait:g} s.")
            time.sleep(wait)
            wait *= 2


class Storage:
    """The files under one location; names are relative to it, with `/` between their parts.

    Args:
        location: a path, or a URL.

    Raises:
        UserError: if no file system is known for the URL, or its package is not installed.
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
        """The whole path or URL of a name, as other libraries take it."""
        return f"{self.location}/{name}" if name else self.location

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, action: Callable[[], T], name: str) -> T:
        return retrying(action, f"Accessing {self.url(name)}") if self.remote else action()

    def sizes(self, name: str = "") -> dict[str, int | None]:
        """What lies directly in a folder: name -> bytes, None for a folder. Empty if there is no such folder."""

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

        found = self._try(listing, name)
        found.pop("", None)
        return found

    def read(self, name: str) -> bytes:
        return self._try(lambda: self._fs.cat_file(self._path(name)), name)

    def open(self, name: str) -> Any:
        """The file opened for reading bytes."""
        return self._try(lambda: self._fs.open(self._path(name), "rb"), name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file whole or not at all, and the folders above it."""
        data = (json.dumps(value, indent=2) + "\n").encode()

        def write() -> None:
            path = self._path(name)
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            if "file" in self._fs.protocol:  # stores write an object whole
                self._fs.pipe_file(f"{path}.tmp", data)
                os.replace(f"{path}.tmp", path)
            else:
                self._fs.pipe_file(path, data)

        self._try(write, name)

    def create_json(self, name: str, value: Any) -> None:
        """Write a small file unless it is there already; as safe as the store's conditional writes are."""
        data = (json.dumps(value, indent=2) + "\n").encode()

        def create() -> None:
            self._fs.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                try:
                    self._fs.pipe_file(self._path(name), data, mode="create")
                except (TypeError, NotImplementedError):  # the store cannot
                    if not self._fs.exists(self._path(name)):
                        self._fs.pipe_file(self._path(name), data)

        self._try(create, name)

    def read_json(self, name: str) -> Any:
        """
        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is not JSON.
        """
        return json.loads(self.read(name))

    def remove(self, name: str, first: str = "") -> None:
        """Remove a folder and all in it, the file `first` before everything else; if it is there."""

        def remove() -> None:
            self._fs.invalidate_cache()
            for path, recursive in ((self._path(f"{name}/{first}"), False), (self._path(name), True)):
                if self._fs.exists(path):
                    self._fs.rm(path, recursive=recursive)

        self._try(remove, name)

    def move(self, name: str, to: str) -> None:
        """Rename a folder; on an object store, which cannot, copy and remove it."""
        self._try(lambda: self._fs.mv(self._path(name), self._path(to), recursive=True), name)
