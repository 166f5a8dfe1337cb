"""Seconds of a step, by its estimate and the speeds of devices and links."""

from dataclasses import dataclass

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.performance.estimate import Estimate


@dataclass(frozen=True)
class Speeds:
    """Speeds of a machine: what a device computes, and what a rank sends."""

    tflops: float  # 10^12 FLOP/s
    intra: float  # GB/s, within a node
    inter: float  # GB/s, across nodes


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on one rank, each as if nothing else took time."""

    compute: float
    within_nodes: float
    across_nodes: float

    @property
    def communication(self) -> float:
        return self.within_nodes + self.across_nodes


def step_time(x: Estimate, speeds: Speeds) -> StepTime:
    """Return the seconds of an estimate; a group that spans nodes sends everything at the speed across them."""
    seconds = _of_parts(x, speeds)
    across = sum(seconds[name] for name in x.across_nodes)
    return StepTime(x.flops / (speeds.tflops * 1e12), sum(seconds.values()) - across, across)


def warning(config: JobConfig, x: Estimate, speeds: Speeds) -> str | None:
    """Return a sentence with a remedy if a step sends for longer than it computes.

    Args:
        config: before `launch.resolve`, as the user knows it.
    """
    found = step_time(x, speeds)
    if found.communication <= found.compute:
        return None
    return (
        f"communication takes {found.communication:.2f} s of a step, longer than its {found.compute:.2f} s of compute; "
        f"{_remedy(config, x, speeds)}."
    )


def _of_parts(x: Estimate, speeds: Speeds) -> dict[str, float]:
    rates = {name: speeds.inter if name in x.across_nodes else speeds.intra for name in vars(x.communication)}
    return {name: sent / (rates[name] * 1e9) for name, sent in vars(x.communication).items()}


def _remedy(config: JobConfig, x: Estimate, speeds: Speeds) -> str:
    """Say what would help most against the longest part."""
    seconds, parallel = _of_parts(x, speeds), config.parallelism
    longest = max(seconds, key=lambda name: seconds[name])
    degrees = {"tensor": "tensor_parallel", "context": "context_parallel", "experts": "expert_parallel"}
    if longest in degrees:
        return f"lower parallelism.{degrees[longest]}_degree"
    # Not where that is set already, and a node has nothing to shard over.
    sharding = longest in x.across_nodes and longest != "replicate" and x.replicas == 1
    if sharding and parallel.data_parallel_shard_degree != -1:
        return "set parallelism.data_parallel_shard_degree = -1 and data_parallel_shard_within = 'node'"
    if sharding and parallel.data_parallel_shard_within == "world":
        return "set parallelism.data_parallel_shard_within = 'node'"
    if longest == "gather" and parallel.fsdp_reshard_after_forward != "never":
        return "set parallelism.fsdp_reshard_after_forward = 'never' if memory allows"
    # Each micro-batch gathers and reduces.
    if x.micro_batches > 1:
        key = "max_local_batch_size" if config.training.local_batch_size == -1 else "local_batch_size"
        return f"raise training.{key} if memory allows, so that a step has fewer micro-batches"
    return "raise training.global_batch_size, or take fewer ranks"
