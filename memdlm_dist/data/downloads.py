"""Shards from any URL: streaming has its own ways to some stores, and fsspec knows the others."""

import os
import urllib.parse
from typing import Any

import fsspec
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader


class FsspecDownloader(CloudDownloader):
    """Copies a file through fsspec. What the file system asks for is taken from its own configuration."""

    @staticmethod
    def _client_identifier() -> str:
        return "fsspec"

    def clean_up(self) -> None:
        """fsspec keeps the connections."""

    def _validate_remote_path(self, remote: str) -> None:
        """Every scheme will do: `register` chose it."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        del timeout  # each file system has its own
        file_system, path = fsspec.core.url_to_fs(remote)
        partial = f"{local}.tmp"
        file_system.get_file(path, partial)
        os.replace(partial, local)


def register(location: str) -> None:
    """Let streaming download from a URL's scheme, if it cannot itself.

    Raises:
        ValueError: if fsspec does not know it either.
        ImportError: if it needs a package that is not installed.
    """
    scheme = urllib.parse.urlparse(location).scheme
    mappings: dict[str, Any] = DOWNLOADER_MAPPINGS
    if scheme not in mappings:
        fsspec.get_filesystem_class(scheme)
        mappings[scheme] = FsspecDownloader
