"""mosaicml-streaming 0.13: private names and patches; importing this module imports streaming."""

import itertools
import logging
import tempfile
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.batching import batching_methods
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, TICK
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash
from streaming.base.partition import get_partitions
from streaming.base.shared import memory, prefix
from streaming.base.shuffle import get_shuffle
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader
from streaming.base.util import bytes_to_int, merge_index
from streaming.base.world import World

# streaming registers a job's folders in shared memory named `<prefix>_<REGISTRATION>`; the prefix is a number.
REGISTRATION = LOCALS

# Seconds to wait until another rank has set the size of new shared memory.
_SIZE_PATIENCE = 10.0


class _SizedSharedMemory(memory.BuiltinSharedMemory):
    """Shared memory that can be opened while another rank creates it.

    It is created empty and sized afterwards. streaming opens it at once, and fails ("cannot mmap an empty file") if the
    rank that creates it is interrupted between the two. A process that was killed there leaves it empty for ever:
    streaming skips the prefix of memory that raises a PermissionError.
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0):
        deadline = time.monotonic() + _SIZE_PATIENCE
        while True:
            try:
                super().__init__(name, create, size)
                return
            except ValueError:
                self.close()
                if create:
                    raise
                if time.monotonic() > deadline:
                    raise PermissionError(f"the shared memory {name} is empty, as a killed process leaves it") from None
            time.sleep(TICK)


memory.BuiltinSharedMemory = _SizedSharedMemory


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


def merge_indices(indices: Sequence[str], folder: str) -> None:
    """Merge index files with streaming's own function, without its warnings about temporary folders.

    Args:
        indices: paths of the index.json of folders that lie in one folder.
        folder: new folder for the merged index.json.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        merge_index(list(indices), folder)
    finally:
        logging.disable(before)


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


_ARRANGED, _GROUPED = "memdlm_dist", "memdlm_dist_groups"


class ArrangedDataset(CacheOnlyEviction):
    """StreamingDataset whose order of samples can be replaced: a subclass overrides `arrange`.

    streaming deals samples to ranks and workers in one step. `arrange` sees the whole epoch instead, in micro-batches
    of all ranks.

    Args:
        arranges: replace the order; False leaves streaming's.
        group_size: consecutive samples that stay together in one micro-batch of one rank; divides the batch size. An
            arranged order needs nothing for that, because each rank gets consecutive rows.
    """

    batch_lengths: NDArray[np.int64] | None = None  # length of each of this worker's batches in the present epoch

    def __init__(self, *, arranges: bool, group_size: int = 1, **options: Any):
        super().__init__(**options)
        self.group_size = group_size
        # Set here, because streaming's constructor accepts only its own methods.
        if arranges:
            self.batching_method = _ARRANGED
        elif group_size > 1:
            self.batching_method = _GROUPED

    def arrange(self, ids_E: NDArray[np.int64], epoch: int, first: int, rows: int) -> tuple[NDArray[np.int64], ...]:
        """Return the sample ids of T micro-batches of all ranks, `[T, rows]`, and the length of each, `[T]`.

        Args:
            ids_E: ids of the epoch in streaming's order, equal for any number of ranks and workers.
            epoch: number of the epoch.
            first: number of samples to skip in the arranged order, because they have been read.
            rows: micro-batch size times number of data-parallel ranks.
        """
        raise NotImplementedError

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids of an epoch in streaming's order for a single rank, `[E]`."""
        partitions = get_partitions(self.partition_algo, self.epoch_size, self.num_canonical_nodes, 1, 1, 1, 1)
        order = partitions.flatten()
        return self.shuffled_ids(order[order != -1][: self.epoch_size], epoch)

    def shuffled_ids(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the sample ids at positions of the shuffled epoch, in the same shape; -1 (no sample) stays -1."""
        shuffle_units, small_per_big = self.resample_streams(epoch)
        if self.shuffle:
            self._set_shuffle_block_size(self._parallel_rank_world)
            nodes, seed = self.num_canonical_nodes, self.shuffle_seed
            shuffle = get_shuffle(self.shuffle_algo, shuffle_units, nodes, seed, epoch, self.shuffle_block_size)
            positions = np.where(positions != -1, shuffle[positions], -1)
        ids: NDArray[np.int64] = np.where(positions != -1, small_per_big[positions], -1)
        return ids

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        work: NDArray[np.int64] = super()._get_work(epoch, sample_in_epoch)
        if self.batching_method != _ARRANGED:
            return work
        rows = work.reshape(-1, self.batch_size + 1)  # see `_deal`
        self.batch_lengths = rows[:, -1]
        return rows[:, :-1].flatten()


def _deal(dataset: ArrangedDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Deal an arranged epoch to nodes, ranks and workers, in streaming's format.

    A batch of a rank is its samples and, as one more column, its length: streaming hands nothing else to the workers.
    torch's loader takes batch t of a rank from its worker t modulo the number of workers.
    """
    size, ranks, workers = dataset.batch_size, world.num_nodes * world.ranks_per_node, world.workers_per_rank
    order = dataset.epoch_order(epoch)
    ids_Tn, length_T = dataset.arrange(order, epoch, sample_in_epoch, size * ranks)
    per_worker = -(-len(ids_Tn) // workers)
    dealt = np.full((per_worker * workers, ranks, size + 1), -1, dtype=np.int64)
    dealt[: len(ids_Tn), :, :-1] = ids_Tn.reshape(-1, ranks, size)
    dealt[: len(ids_Tn), :, -1] = length_T[:, None]
    shape = (per_worker, workers, world.num_nodes, world.ranks_per_node, size + 1)
    return dealt.reshape(shape).transpose(2, 3, 1, 0, 4)


def _deal_groups(dataset: ArrangedDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Deal groups of n consecutive samples to nodes, ranks and workers, in streaming's format.

    Like streaming's method "random", but partitions groups instead of samples. Group k has the positions n k to
    n k + n - 1 of the shuffled epoch, so a node reads from its own canonical nodes. A canonical node that does not end
    at a multiple of n shares fewer than 2n positions with the next one.
    """
    n = dataset.group_size
    groups = get_partitions(
        dataset.partition_algo,
        dataset.epoch_size // n,
        dataset.num_canonical_nodes,
        world.num_nodes,
        world.ranks_per_node,
        world.workers_per_rank,
        dataset.batch_size // n,
        sample_in_epoch // n,
        dataset.initial_physical_nodes,
    )
    positions = np.where(groups[..., None] != -1, groups[..., None] * n + np.arange(n), -1)
    return dataset.shuffled_ids(positions.reshape(*groups.shape[:-1], dataset.batch_size), epoch)


batching_methods |= {_ARRANGED: _deal, _GROUPED: _deal_groups}


def _get_sampling(
    samples_per_shard: NDArray[np.int64], choose: int, granularity: int, seed: int, epoch: int, use_epoch: bool
) -> NDArray[np.int64]:
    """Return streaming's numbers of samples to draw from each shard of a stream, without a Python loop.

    streaming loops over picks of `granularity` rows, 1 by default. That takes about 2 s per million picks, at the
    start of each epoch, while all ranks wait.
    """
    repeats, left = divmod(int(choose), int(samples_per_shard.sum()))
    chosen: NDArray[np.int64] = samples_per_shard * repeats
    if left:
        picks_per_shard = -(-samples_per_shard // granularity)
        shard_of_pick = np.repeat(np.arange(len(samples_per_shard)), picks_per_shard)
        size_of_pick = np.full(len(shard_of_pick), granularity)
        size_of_pick[np.cumsum(picks_per_shard) - 1] = samples_per_shard - (picks_per_shard - 1) * granularity
        order = np.random.default_rng(seed + epoch if use_epoch else seed).permutation(len(shard_of_pick))
        sizes = size_of_pick[order]
        drawn = np.clip(left - (np.cumsum(sizes) - sizes), 0, sizes)
        chosen += np.bincount(shard_of_pick[order], drawn, len(chosen)).astype(np.int64)  # sums are exact
    return chosen


streaming_dataset.get_sampling = _get_sampling


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
