"""mosaicml-streaming 0.13: private names and patches; importing this module imports streaming."""

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

# streaming registers a job's folders in shared memory named `<prefix>_<REGISTRATION>`; the prefix is a number.
REGISTRATION = LOCALS


def checksum(name: str, data: bytes) -> str:
    """Compute a checksum as in index.json; streaming has no public function for it."""
    digest: str = get_hash(name, data)
    return digest


def start_prefixes_at(first: int) -> None:
    """Let this process try shared-memory prefixes from `first` on.

    By default streaming takes the first free prefix from 0 on. Two torchrun agents on one machine could then take the
    same one.
    """
    prefix._each_prefix_int = lambda: itertools.count(first)


def registered_folders(registration: bytes) -> list[str]:
    """Return the folders that the content of a shared-memory registration lists.

    Raises:
        ValueError, IndexError: if `registration` is malformed.
    """
    folders: list[str] = prefix._unpack_locals(registration)[0]
    return folders


def lock_files(name_prefix: str) -> list[Path]:
    """Return the lock files of a shared-memory prefix, such as "000003_"."""
    return [Path(tempfile.gettempdir(), f"{name_prefix}{lock}") for lock in (BARRIER_FILELOCK, CACHE_FILELOCK)]


def num_nodes(dataset: StreamingDataset) -> int:
    """Return the number of nodes that read a dataset; a state dict of the dataset must contain this number."""
    count: int = dataset._unique_rank_world.num_nodes
    return count


def stop_threads(dataset: StreamingDataset) -> None:
    """Stop the threads of a running iteration; otherwise they keep the process alive after an error."""
    if hasattr(dataset, "_event"):
        dataset._event.set()


def can_download(scheme: str) -> bool:
    """Return whether streaming supports downloads from a URL scheme."""
    return scheme in DOWNLOADER_MAPPINGS


class CacheOnlyEviction(StreamingDataset):
    """StreamingDataset whose cache limit applies only to copies of remote streams.

    streaming 0.13 also counts the shards of local streams and all index files, and evicts local shards to make room. If
    nothing is left to evict, it waits forever.
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
            raise ValueError("no cached copy is left to delete: data.cache_limit is too low")
        self._evict_shard(int(candidates[np.argmin(self._shard_access_times.numpy()[candidates])]))


def size_in_bytes(text: str) -> int:
    """Parse a size such as 200gb into bytes.

    Raises:
        ValueError: if `text` is not a size.
    """
    return int(bytes_to_int(text))


class Downloader(CloudDownloader):
    """Base class of a downloader for one URL scheme, with a public method to override; streaming's are private."""

    @abstractmethod
    def fetch(self, remote: str, local: str) -> None:
        """Download a file from a URL to a local path."""

    def clean_up(self) -> None:
        """Do nothing, so that connections stay open."""

    @staticmethod
    def _client_identifier() -> str:
        return "fetch"

    def _validate_remote_path(self, remote: str) -> None:
        """Accept every path: streaming has already chosen the downloader by the scheme."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        del timeout  # each file system has its own timeout
        self.fetch(remote, local)


def register(scheme: str, downloader: type[Downloader]) -> None:
    """Register a downloader for a URL scheme; streaming has no public way to add one."""
    mappings: dict[str, Any] = DOWNLOADER_MAPPINGS
    mappings[scheme] = downloader
