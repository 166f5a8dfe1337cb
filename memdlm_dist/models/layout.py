"""Parallel layout of a run: degrees and device meshes."""

from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config.job_config import Parallelism as TitanParallelism
from torchtitan.distributed import ParallelDims

from memdlm_dist.models.context_parallel import Method


@dataclass
class Parallelism(TitanParallelism):
    """torchtitan's `[parallelism]` section with two more keys; the load balancer of context parallelism is off."""

    data_parallel_shard_within: Literal["world", "node"] = "world"
    """Scope of sharding for data_parallel_shard_degree = -1.

    world: shard over all ranks that the other degrees leave. node: shard within a node and set
    data_parallel_replicate_degree to the number of nodes, so that only gradients cross nodes. No effect on a single
    node, or if one of the two degrees is set."""

    context_parallel_method: Method = "ulysses"
    """Attention across ranks with context_parallel_degree > 1.

    ulysses: exchange tokens for heads; the degree times tensor_parallel_degree must divide the number of heads. ring:
    torch's ring attention, for CUDA only and for whole rows without documents."""

    context_parallel_load_balancer: str | None = None
    """Unused: attention is not causal, so every rank has the same work."""


class Layout(Protocol):
    """Typed subset of torchtitan's `ParallelDims` that this package uses; all degrees are at least 1."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int

    @property
    def dp_enabled(self) -> bool:
        """True with more than one data-parallel rank."""
        ...

    @property
    def dp_cp_enabled(self) -> bool:
        """True if data or context parallelism is on."""
        ...

    @property
    def fsdp_enabled(self) -> bool:
        """True if FSDP2 shards parameters, over data- or context-parallel ranks."""
        ...

    def get_mesh(self, dims: str | list[str]) -> DeviceMesh:
        """Return the mesh of one or several dimensions, and raise if it does not exist."""
        ...

    def get_optional_mesh(self, dims: str | list[str]) -> DeviceMesh | None:
        """Return the mesh of one or several dimensions; None if it is not enabled."""
        ...


def build_layout(parallelism: Parallelism, world_size: int) -> Layout:
    """Build the device meshes of all parallel degrees; torch.distributed must be initialised."""
    dims = ParallelDims(
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=parallelism.data_parallel_shard_degree,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        pp=1,
        ep=parallelism.expert_parallel_degree,
        etp=parallelism.expert_tensor_parallel_degree,
        world_size=world_size,
    )
    dims.build_mesh()
    return cast(Layout, dims)
