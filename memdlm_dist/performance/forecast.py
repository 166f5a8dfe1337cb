"""Forecast of a configuration on many ranks by one process: a table of estimates, with remedies."""

import torch.distributed as dist

from memdlm_dist.config import check_layout, launch
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError
from memdlm_dist.performance.estimate import Estimate, estimate
from memdlm_dist.performance.step_time import Speeds, step_time, warning
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args, model_on_meta

# Share of a device's memory for the allocator's fragmentation, libraries and the buffers of collectives.
_RESERVE = 0.1
# Table labels of the fields of `MemoryEstimate`.
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "gathered": "gathered parameters",
    "gathered_gradients": "gradients being reduced",
    "activations": "activations",
    "head": "logits and gradient of the head",
    "fast_weights": "fast weights",
    "dequantized": "dequantised weights",
}
# Table labels of the fields of `Communication`.
_COMMUNICATION = {
    "gather": "FSDP all-gathers",
    "reduce": "FSDP reductions",
    "replicate": "HSDP all-reduces",
    "tensor": "tensor parallel",
    "context": "context parallel",
    "experts": "expert parallel",
}


def forecast(
    config: JobConfig,
    world_size: int,
    layers: int | None = None,
    node_size: int | None = None,
    documents: int = 1,
) -> Estimate:
    """Estimate the memory, communication and FLOPs of a configuration on `world_size` ranks.

    Args:
        config: the user's configuration, before `launch.resolve`.
        world_size: number of ranks.
        layers: number of layers; None for the flavour's.
        node_size: ranks per node; None for a single node.
        documents: maximum number of documents in a packed row.

    Raises:
        UserError: if the configuration is invalid for this number of ranks.
    """
    config = launch.resolve(config, world_size, node_size)
    args = get_model_args(config)
    args.n_layers = layers or args.n_layers
    check_layout.check_backbone(config, args)
    init_fake_process_group(world_size)
    try:
        dims = get_layout(config, world_size)
        model = model_on_meta(config, args, dims)
        return estimate(model, args, dims, config, node_size, documents)
    finally:
        dist.destroy_process_group()


def table(config: JobConfig, results: dict[int, Estimate | UserError], device_memory: float, speeds: Speeds) -> str:
    """Format the estimates side by side, followed by errors and warnings (slow communication, too little memory).

    Args:
        config: the user's configuration, before `launch.resolve`.
        results: estimate or error by number of ranks.
        device_memory: memory of a device in GiB.
        speeds: speeds of the machine.
    """
    estimates = {size: x for size, x in results.items() if isinstance(x, Estimate)}
    lines = []
    if estimates:
        one = next(iter(estimates.values()))
        trained = f", {one.trained:,} trained" if one.trained != one.parameters else ""
        active = f", {one.active:,} for each token" if one.active != one.parameters else ""
        lines.append(f"{config.model.name} {config.model.flavor}: {one.parameters:,} parameters{active}{trained}")
        rows: list[tuple[str, list[str]]] = [("ranks", [f"{size}" for size in estimates])]
        if any(x.replicas > 1 for x in estimates.values()):
            rows.append(("replicas of the parameters", [f"{x.replicas}" for x in estimates.values()]))
        rows.append(("sequences of a micro-batch", [f"{x.sequences}" for x in estimates.values()]))
        rows.append(("micro-batches of a step", [f"{x.micro_batches}" for x in estimates.values()]))
        rows += [
            (label, [f"{getattr(x.memory, key) / 2**30:.2f}" for x in estimates.values()])
            for key, label in _MEMORY.items()
        ]
        rows.append(("memory of a rank (GiB)", [f"{x.memory.total / 2**30:.1f}" for x in estimates.values()]))
        rows += [
            (label, [f"{getattr(x.communication, key) / 1e9:.2f}" for x in estimates.values()])
            for key, label in _COMMUNICATION.items()
            if any(getattr(x.communication, key) for x in estimates.values())
        ]
        rows.append(
            ("sent by a rank in a step (GB)", [f"{x.communication.total / 1e9:.1f}" for x in estimates.values()])
        )
        times = [step_time(x, speeds) for x in estimates.values()]
        rows.append(("compute of a step (s)", [f"{time.compute:.2f}" for time in times]))
        rows.append(("sending within nodes (s)", [f"{time.within_nodes:.2f}" for time in times]))
        rows.append(("sending across nodes (s)", [f"{time.across_nodes:.2f}" for time in times]))
        lines += [f"{label:<34}{''.join(f'{value:>10}' for value in values)}" for label, values in rows]
    for size, x in results.items():
        if isinstance(x, UserError):
            lines.append(f"{size} ranks: {x}")
            continue
        if slow := warning(config, x, speeds):
            lines.append(f"{size} ranks: {slow}")
        if not fits(x, device_memory):
            lines.append(
                f"{size} ranks: {x.memory.total / 2**30:.1f} GiB will not fit on devices of {device_memory:g} GiB, "
                f"with a tenth reserved for the allocator and libraries; {_remedy(config, x)}."
            )
    return "\n".join(lines)


def fits(x: Estimate, device_memory: float) -> bool:
    """Return True if a rank's peak memory fits on a device of `device_memory` GiB, with a reserve of a tenth."""
    return x.memory.total <= (1 - _RESERVE) * device_memory * 2**30


def _remedy(config: JobConfig, x: Estimate) -> str:
    """Return the most effective remedy for the largest part of the memory."""
    memory = vars(x.memory)
    largest = max(memory, key=lambda key: memory[key])
    if largest == "activations":
        if config.activation_checkpoint.mode != "full":
            return 'set activation_checkpoint.mode = "full"'
        if x.sequences > 1:
            return f"lower training.{_local_batch_size(config)}"
        return "raise parallelism.context_parallel_degree or tensor_parallel_degree"
    if largest in ("weights", "gradients", "optimizer"):
        return 'shard over more ranks, or train adapters (model.converters = ["lora"])'
    if largest == "fast_weights":
        lower = f"parametric_memory.layer_fraction or training.{_local_batch_size(config)}"
        shared = config.parametric_memory.granularity == "batch"
        return f"lower {lower}" + ("" if shared else ", or raise parametric_memory.samples_per_set")
    if largest == "gathered" and config.parallelism.fsdp_reshard_after_forward == "never":
        return 'set parallelism.fsdp_reshard_after_forward = "default"'
    return "raise parallelism.tensor_parallel_degree, or lower parametric_memory.layer_fraction"


def _local_batch_size(config: JobConfig) -> str:
    """Return the key of `[training]` that determines the rows per micro-batch."""
    return "max_local_batch_size" if config.training.local_batch_size == -1 else "local_batch_size"
