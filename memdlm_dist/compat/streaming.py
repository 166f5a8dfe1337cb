"""mosaicml-streaming 0.13: private names and patches. Importing this file imports streaming."""

import itertools
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash
from streaming.base.shared import prefix
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader
from streaming.base.util import bytes_to_int

# How the shared memory that names a job's folders ends; a number stands before it.
REGISTRATION = LOCALS


def checksum(name: str, data: bytes) -> str:
    """Return a checksum as an index.json has it; streaming exports the function from no public module."""
    found: str = get_hash(name, data)
    return found


def number_from(first: int) -> None:
    """Number this process's shared memory from `first` on.

    streaming takes the first free number on each node; two agents on one machine would take the same one.
    """
    prefix._each_prefix_int = lambda: itertools.count(first)


def registered_folders(registration: bytes) -> list[str]:
    """Return the folders that a registration in shared memory names.

    Raises:
        ValueError, IndexError: if it is not a registration.
    """
    folders: list[str] = prefix._unpack_locals(registration)[0]
    return folders


def locks(number: str) -> list[Path]:
    """Return the lock files of the shared memory of a number."""
    return [Path(tempfile.gettempdir(), f"{number}{lock}") for lock in (BARRIER_FILELOCK, CACHE_FILELOCK)]


def nodes(dataset: StreamingDataset) -> int:
    """Return the number of nodes that a dataset is read on, which its state dict must name."""
    count: int = dataset._unique_rank_world.num_nodes
    return count


def stop_threads(dataset: StreamingDataset) -> None:
    """End the download threads of a running iteration: they would keep the process alive after an error."""
    if hasattr(dataset, "_event"):
        dataset._event.set()


def can_download(scheme: str) -> bool:
    """Return whether streaming can download from a URL's scheme."""
    return scheme in DOWNLOADER_MAPPINGS


class CacheOnlyEviction(StreamingDataset):
    """A StreamingDataset whose cache limit concerns copies of remote streams alone.

    streaming counts the shards of local streams and all indices as cached, and deletes such shards to make room; where
    nothing is left to delete, it waits for ever (0.13).
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.cache_limit:
            local = [s for i, s in zip(self.stream_per_shard, self.shards, strict=True) if not self.streams[i].remote]
            self.cache_limit += sum(shard.get_raw_size() for shard in local)
            self.cache_limit += sum(stream.get_index_size() for stream in self.streams)

    def _evict_coldest_shard(self) -> None:
        cached = np.array([bool(self.streams[i].remote) for i in self.stream_per_shard])
        candidates = np.flatnonzero(cached & (self._shard_states.numpy() == _ShardState.LOCAL))
        if not len(candidates):
            raise ValueError("there is no copy to delete: data.cache_limit is too low")
        self._evict_shard(int(candidates[np.argmin(self._shard_access_times.numpy()[candidates])]))


def size_in_bytes(text: str) -> int:
    """Return a size such as 200gb in bytes.

    Raises:
        ValueError: if it is not one.
    """
    return int(bytes_to_int(text))


class Downloader(CloudDownloader):
    """A way to download; streaming's own methods to override are private."""

    @abstractmethod
    def fetch(self, remote: str, local: str) -> None:
        """Copy a file from a URL to a path."""

    def clean_up(self) -> None:
        """Keep the connections."""

    @staticmethod
    def _client_identifier() -> str:
        return "fetch"

    def _validate_remote_path(self, remote: str) -> None:
        """Accept every path: `register` chose the scheme."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        del timeout  # each file system has its own
        self.fetch(remote, local)


def register(scheme: str, downloader: type[Downloader]) -> None:
    """Let streaming download a scheme's URLs; it has no public way to add one."""
    mappings: dict[str, Any] = DOWNLOADER_MAPPINGS
    mappings[scheme] = downloader
