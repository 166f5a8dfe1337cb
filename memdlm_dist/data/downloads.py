"""Downloads of shards through fsspec, for URL schemes that streaming does not support itself."""

import os
import urllib.parse

import fsspec

from memdlm_dist.compat import streaming


class FsspecDownloader(streaming.Downloader):
    """Downloader that copies files through fsspec; credentials come from the file system's own configuration."""

    def fetch(self, remote: str, local: str) -> None:
        """Copy the file at the URL `remote` to the path `local`, which appears only once it is complete."""
        file_system, path = fsspec.core.url_to_fs(remote)
        partial = f"{local}.tmp"
        file_system.get_file(path, partial)
        os.replace(partial, local)


def register(location: str) -> None:
    """Register `FsspecDownloader` for a URL's scheme, unless streaming supports the scheme itself.

    Raises:
        ValueError: if fsspec does not know the scheme either.
        ImportError: if the scheme needs a package that is not installed.
    """
    scheme = urllib.parse.urlparse(location).scheme
    if not streaming.can_download(scheme):
        fsspec.get_filesystem_class(scheme)
        streaming.register(scheme, FsspecDownloader)
