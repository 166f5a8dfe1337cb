"""Time of a step, from its estimate and the speeds of devices and links."""

from dataclasses import dataclass

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.performance.estimate import Estimate


@dataclass(frozen=True)
class Speeds:
    """Compute speed of a device, and communication speeds of a rank."""

    tflops: float  # 10^12 FLOP/s
    intra: float  # GB/s within a node
    inter: float  # GB/s across nodes


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on one rank; the fields assume no overlap with each other."""

    compute: float
    within_nodes: float
    across_nodes: float

    @property
    def communication(self) -> float:
        """Seconds of communication, within and across nodes."""
        return self.within_nodes + self.across_nodes


def step_time(x: Estimate, speeds: Speeds) -> StepTime:
    """Compute the seconds of an estimated step; a group that spans nodes sends everything at the inter-node speed."""
    seconds = _communication_seconds(x, speeds)
    across = sum(seconds[name] for name in x.across_nodes)
    return StepTime(x.flops / (speeds.tflops * 1e12), sum(seconds.values()) - across, across)


def warning(config: JobConfig, x: Estimate, speeds: Speeds) -> str | None:
    """Return a sentence with a remedy if a step communicates for longer than it computes, else None.

    Args:
        config: the user's configuration, before `launch.resolve`.
        x: estimate of the resolved configuration.
        speeds: speeds of the machine.
    """
    seconds = step_time(x, speeds)
    if seconds.communication <= seconds.compute:
        return None
    return (
        f"communication takes {seconds.communication:.2f} s of a step, "
        f"longer than its {seconds.compute:.2f} s of compute; "
        f"{_remedy(config, x, speeds)}."
    )


def _communication_seconds(x: Estimate, speeds: Speeds) -> dict[str, float]:
    rates = {name: speeds.inter if name in x.across_nodes else speeds.intra for name in vars(x.communication)}
    return {name: sent / (rates[name] * 1e9) for name, sent in vars(x.communication).items()}


def _remedy(config: JobConfig, x: Estimate, speeds: Speeds) -> str:
    """Return the most effective remedy for the longest part of the communication."""
    seconds, parallel = _communication_seconds(x, speeds), config.parallelism
    longest = max(seconds, key=lambda name: seconds[name])
    degrees = {"tensor": "tensor_parallel", "context": "context_parallel", "experts": "expert_parallel"}
    if longest in degrees:
        return f"lower parallelism.{degrees[longest]}_degree"
    # Not if parameters are already replicated, or if the remedy is set but a node has only one data-parallel rank.
    sharding = longest in x.across_nodes and longest != "replicate" and x.replicas == 1
    if sharding and parallel.data_parallel_shard_degree != -1:
        return "set parallelism.data_parallel_shard_degree = -1 and data_parallel_shard_within = 'node'"
    if sharding and parallel.data_parallel_shard_within == "world":
        return "set parallelism.data_parallel_shard_within = 'node'"
    if longest == "gather" and parallel.fsdp_reshard_after_forward != "never":
        return "set parallelism.fsdp_reshard_after_forward = 'never' if memory allows"
    # Every micro-batch gathers parameters and reduces gradients.
    if x.micro_batches > 1:
        key = "max_local_batch_size" if config.training.local_batch_size == -1 else "local_batch_size"
        return f"raise training.{key} if memory allows, so that a step has fewer micro-batches"
    return "raise training.global_batch_size, or take fewer ranks"
