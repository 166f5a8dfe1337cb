"""Number of launched processes, their process group, and the autocast context of a layout."""

import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch.distributed as dist
from torchtitan.distributed import utils


class Processes(NamedTuple):
    """Number of processes of a launch."""

    total: int
    per_node: int  # on this node
    nodes: int | None = None  # None without torchrun: total / per_node, rounded up


def launched_processes() -> Processes:
    """Return the number of processes that torchrun started, from its environment; one process without torchrun."""
    total = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = os.environ.get("GROUP_WORLD_SIZE")
    return Processes(total, int(os.environ.get("LOCAL_WORLD_SIZE", total)), int(nodes) if nodes else None)


def join(comm: Any) -> int:
    """Initialise the default process group from torchrun's environment, unless it is initialised.

    Args:
        comm: torchtitan's [comm] section.

    Returns:
        The world size.
    """
    return dist.get_world_size() if dist.is_initialized() else int(utils.init_distributed(comm))


def init_fake_process_group(world_size: int) -> None:
    """Initialise a fake process group without communication, in which this process is rank 0."""
    utils.init_fake_mode(world_size)


def autocast(dims: Any, dtype: str, device_type: str) -> AbstractContextManager[None]:
    """Return the autocast context of torchtitan's trainer: no autocast with TP, nor with FSDP2, which casts internally.

    Args:
        dims: torchtitan's ParallelDims.
        dtype: training.mixed_precision_param.
    """
    context: AbstractContextManager[None] = utils.maybe_enable_amp(dims, dtype, device_type)
    return context
