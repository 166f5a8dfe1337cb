"""The parallel layout of a run: the degrees and the meshes of its ranks."""

from dataclasses import dataclass
from typing import Literal, Protocol, cast

from torch.distributed.device_mesh import DeviceMesh
from torchtitan.config.job_config import Parallelism as TitanParallelism
from torchtitan.distributed import ParallelDims

from memdlm_dist.models.context_parallel import Method


@dataclass
class Parallelism(TitanParallelism):
    """torchtitan's section with one default changed and two keys more."""

    data_parallel_shard_within: Literal["world", "node"] = "world"
    """Ranks that data_parallel_shard_degree = -1 shards parameters over. world: all that the other degrees leave; node:
    those of one node, so that only gradients cross nodes, with data_parallel_replicate_degree the number of nodes.
    Without effect on a single node, or if one of the two degrees is set."""

    context_parallel_method: Method = "ulysses"
    """How tokens attend to those of other ranks with context_parallel_degree > 1. ulysses exchanges tokens for heads,
    which the degree times tensor_parallel_degree must divide; ring is torch's ring attention, for CUDA and whole rows
    without documents."""

    context_parallel_load_balancer: str | None = None
    """Unused: attention is not causal, so that every rank has the same work."""


class Layout(Protocol):
    """What the package reads of torchtitan's `ParallelDims`; its degrees are at least 1."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int

    @property
    def dp_enabled(self) -> bool: ...

    @property
    def dp_cp_enabled(self) -> bool: ...

    @property
    def fsdp_enabled(self) -> bool: ...

    def get_mesh(self, dims: str | list[str]) -> DeviceMesh: ...

    def get_optional_mesh(self, dims: str | list[str]) -> DeviceMesh | None: ...


def build_layout(parallelism: Parallelism, world_size: int) -> Layout:
    """Build the meshes of the parallel degrees; torch.distributed knows the ranks."""
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
