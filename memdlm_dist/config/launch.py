"""Resolution at launch: parallel degrees and batch sizes derived from the number of processes."""

import copy
import logging

from memdlm_dist.config.job_config import JobConfig, Training
from memdlm_dist.errors import require
from memdlm_dist.models.layout import Parallelism
from memdlm_dist.runtime.rank_0 import is_rank_0

logger = logging.getLogger()


def resolve(config: JobConfig, world_size: int, node_size: int | None = None, nodes: int | None = None) -> JobConfig:
    """Return a copy of the configuration with all parallel degrees and batch sizes resolved for a launch.

    Args:
        world_size: number of processes.
        node_size: number of processes on this node; `world_size` if None.
        nodes: number of nodes; `world_size / node_size`, rounded up, if None.

    Raises:
        UserError: naming the degree or the batch size that does not fit.
    """
    require(
        world_size == 1 or not config.checkpoint.create_seed_checkpoint,
        "checkpoint.create_seed_checkpoint needs a single process, without sharding; set NGPU=1.",
    )
    config = copy.deepcopy(config)
    parallel = config.parallelism
    node_size = node_size or world_size
    _resolve_degrees(parallel, world_size, node_size, nodes or -(-world_size // node_size))
    dp_size = parallel.data_parallel_replicate_degree * parallel.data_parallel_shard_degree
    _resolve_batch_sizes(config.training, dp_size, config.parametric_memory.group_size)
    return config


def _resolve_degrees(parallel: Parallelism, world_size: int, node_size: int, nodes: int) -> None:
    """Set the degrees of data parallelism: replicate and shard."""
    tp_size, cp_size = parallel.tensor_parallel_degree, parallel.context_parallel_degree
    derive_shard = parallel.data_parallel_shard_degree == -1
    if derive_shard and parallel.data_parallel_shard_within == "node" and parallel.data_parallel_replicate_degree == 1:
        parallel.data_parallel_replicate_degree = _replicas(tp_size, cp_size, world_size, node_size, nodes)
    replicate = parallel.data_parallel_replicate_degree
    others = replicate * tp_size * cp_size
    layout = f"data_parallel_replicate_degree {replicate} x tensor_parallel_degree {tp_size}"
    layout += f" x context_parallel_degree {cp_size}" if cp_size > 1 else ""
    if derive_shard:
        require(
            world_size % others == 0,
            f"{world_size} processes cannot be divided into {layout}, which needs a multiple of {others}; change NGPU "
            "or the degrees under [parallelism].",
        )
        parallel.data_parallel_shard_degree = world_size // others
    shard = parallel.data_parallel_shard_degree
    require(
        shard * others == world_size,
        f"{layout} x data_parallel_shard_degree {shard} makes {shard * others} ranks, but "
        f"{world_size} processes were started; change NGPU or the degrees under [parallelism].",
    )
    require(
        replicate == 1 or shard * cp_size > 1,
        "parallelism.data_parallel_replicate_degree > 1 needs data_parallel_shard_degree > 1 (HSDP): replication "
        "without sharding is not supported; use data_parallel_shard_degree instead.",
    )


def _replicas(tp_size: int, cp_size: int, world_size: int, node_size: int, nodes: int) -> int:
    """Return the number of replicas for sharding within a node: `nodes`, or 1 if that leaves nothing to shard over."""
    if node_size >= world_size:
        return 1
    require(
        world_size == nodes * node_size,
        f"parallelism.data_parallel_shard_within = 'node' needs the same number of processes on every node, but "
        f"this one has {node_size} of the {world_size} on {nodes} nodes; set NGPU alike on all nodes, or the key to "
        "'world'.",
    )
    if node_size % (tp_size * cp_size) == 0 and node_size > tp_size:
        return nodes
    if is_rank_0():
        logger.warning(
            f"parallelism.data_parallel_shard_within = 'node': tensor_parallel_degree {tp_size} x "
            f"context_parallel_degree {cp_size} leaves nothing to shard over in a node of {node_size} processes; "
            "parameters are sharded over all nodes."
        )
    return 1


def _resolve_batch_sizes(training: Training, dp_size: int, group_size: int) -> None:
    """Set the local and the global batch size for `dp_size` data-parallel ranks.

    Args:
        group_size: samples that share fast weights; a derived local batch size is a multiple of it if one fits.
    """
    total = training.global_batch_size
    if training.local_batch_size == -1:
        require(
            total % dp_size == 0,
            f"training.global_batch_size = {total} cannot be divided among {dp_size} data-parallel ranks; set it to a "
            f"multiple of {dp_size} (the nearest is {max(1, round(total / dp_size)) * dp_size}), or change NGPU or the "
            "degrees under [parallelism].",
        )
        share = total // dp_size
        limit = min(share, training.max_local_batch_size or share)
        sizes = [size for size in range(limit, 0, -1) if share % size == 0]
        training.local_batch_size = next((size for size in sizes if size % group_size == 0), sizes[0])
    smallest = training.local_batch_size * dp_size
    if total == -1:
        training.global_batch_size = smallest
    require(
        training.global_batch_size % smallest == 0,
        f"training.global_batch_size = {total} must be a multiple of training.local_batch_size "
        f"{training.local_batch_size} x {dp_size} data-parallel ranks = {smallest}; change one of them, or set "
        "training.local_batch_size = -1, which takes a rank's share.",
    )
