"""The processes of a launch: how many, their process group, and the autocast that goes with a layout."""

import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch.distributed as dist
from torchtitan.distributed import utils


class Processes(NamedTuple):
    """The number of processes of a launch."""

    total: int
    per_node: int  # on this node
    nodes: int | None = None  # None: as many as the others say


def launched_processes() -> Processes:
    """Return the processes that torchrun has started; one without it."""
    total = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = os.environ.get("GROUP_WORLD_SIZE")
    return Processes(total, int(os.environ.get("LOCAL_WORLD_SIZE", total)), int(nodes) if nodes else None)


def join(comm: Any) -> int:
    """Join the process group of the environment's ranks, unless that is done; returns the number of ranks.

    Args:
        comm: torchtitan's [comm] section.
    """
    return dist.get_world_size() if dist.is_initialized() else int(utils.init_distributed(comm))


def init_fake_process_group(world_size: int) -> None:
    """Make a process group of so many ranks that communicate nothing, of which this process is the first."""
    utils.init_fake_mode(world_size)


def autocast(dims: Any, dtype: str, device_type: str) -> AbstractContextManager[None]:
    """Return the autocast of torchtitan's trainer: FSDP2 casts by itself, a single rank does not.

    Args:
        dims: the layout.
        dtype: `training.mixed_precision_param`.
    """
    context: AbstractContextManager[None] = utils.maybe_enable_amp(dims, dtype, device_type)
    return context
