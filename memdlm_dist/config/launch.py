"""Resolution at launch: degrees and batch sizes that follow from the number of processes."""

import copy
import logging

from memdlm_dist.config.job_config import JobConfig, Training
from memdlm_dist.errors import require
from memdlm_dist.models.layout import Parallelism
from memdlm_dist.runtime.rank_0 import is_rank_0

logger = logging.getLogger()


def resolve(config: JobConfig, world_size: int, node_size: int | None = None, nodes: int | None = None) -> JobConfig:
    """Return a copy of a configuration in which degrees and batch sizes are positive numbers that fit a launch.

    Args:
        world_size: number of processes.
        node_size: those of this node; all of them if None.
        nodes: number of nodes; as many as such nodes make if None.

    Raises:
        UserError: naming the degree or the batch size that does not fit.
    """
    require(
        world_size == 1 or not config.checkpoint.create_seed_checkpoint,
        "checkpoint.create_seed_checkpoint needs a single process, so that nothing is sharded; set NGPU=1.",
    )
    config = copy.deepcopy(config)
    parallel = config.parallelism
    node_size = node_size or world_size
    _resolve_degrees(parallel, world_size, node_size, nodes or -(-world_size // node_size))
    ranks = parallel.data_parallel_replicate_degree * parallel.data_parallel_shard_degree
    _resolve_batch_sizes(config.training, ranks)
    return config


def _resolve_degrees(parallel: Parallelism, world_size: int, node_size: int, nodes: int) -> None:
    """Set the degrees of data parallelism."""
    tensor, context = parallel.tensor_parallel_degree, parallel.context_parallel_degree
    leftover = parallel.data_parallel_shard_degree == -1
    if leftover and parallel.data_parallel_shard_within == "node" and parallel.data_parallel_replicate_degree == 1:
        parallel.data_parallel_replicate_degree = _replicas(tensor, context, world_size, node_size, nodes)
    replicate = parallel.data_parallel_replicate_degree
    others = replicate * tensor * context
    layout = f"data_parallel_replicate_degree {replicate} x tensor_parallel_degree {tensor}"
    layout += f" x context_parallel_degree {context}" if context > 1 else ""
    if leftover:
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
        replicate == 1 or shard * context > 1,
        "parallelism.data_parallel_replicate_degree > 1 needs data_parallel_shard_degree > 1 (HSDP): replication "
        "without sharding is not supported; use data_parallel_shard_degree instead.",
    )


def _replicas(tensor: int, context: int, world_size: int, node_size: int, nodes: int) -> int:
    """Return the number of replicas for sharding within a node: one a node, or one in all where that is impossible."""
    if node_size >= world_size:
        return 1
    require(
        world_size == nodes * node_size,
        f"parallelism.data_parallel_shard_within = 'node' needs as many processes on every node, but this one has "
        f"{node_size} of the {world_size} on {nodes} nodes; set NGPU alike on all nodes, or the key to 'world'.",
    )
    if node_size % (tensor * context) == 0 and node_size > tensor:
        return nodes
    if is_rank_0():
        logger.warning(
            f"parallelism.data_parallel_shard_within = 'node': tensor_parallel_degree {tensor} x "
            f"context_parallel_degree {context} leaves nothing to shard over in a node of {node_size} processes; "
            "parameters are sharded over all nodes."
        )
    return 1


def _resolve_batch_sizes(training: Training, ranks: int) -> None:
    """Set the batch sizes of so many data-parallel ranks."""
    total = training.global_batch_size
    if training.local_batch_size == -1:
        require(
            total % ranks == 0,
            f"training.global_batch_size = {total} cannot be divided among {ranks} data-parallel ranks; set it to a "
            f"multiple of {ranks} (the nearest is {max(1, round(total / ranks)) * ranks}), or change NGPU or the "
            "degrees under [parallelism].",
        )
        share = total // ranks
        most = min(share, training.max_local_batch_size or share)
        training.local_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
    micro = training.local_batch_size * ranks
    if total == -1:
        training.global_batch_size = micro
    require(
        training.global_batch_size % micro == 0,
        f"training.global_batch_size = {total} must be a multiple of training.local_batch_size "
        f"{training.local_batch_size} x {ranks} data-parallel ranks = {micro}; change one of them, or set "
        "training.local_batch_size = -1, which takes a rank's share.",
    )
