"""Shards from any URL: streaming has its own ways to some stores, and fsspec knows the others."""

import os
import urllib.parse

import fsspec

from memdlm_dist.compat import streaming


class FsspecDownloader(streaming.Downloader):
    """Copies a file through fsspec. What the file system asks for is taken from its own configuration."""

    def fetch(self, remote: str, local: str) -> None:
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
    if not streaming.can_download(scheme):
        fsspec.get_filesystem_class(scheme)
        streaming.register(scheme, FsspecDownloader)
