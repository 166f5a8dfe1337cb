"""Forecasts of a configuration on many ranks, made by one process: the estimates, side by side, and what would help."""

import torch.distributed as dist

from memdlm_dist.config import check_layout, launch
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError
from memdlm_dist.performance.estimate import Estimate, estimate
from memdlm_dist.performance.step_time import Speeds, step_time, warning
from memdlm_dist.runtime.process_group import init_fake_process_group
from memdlm_dist.training.backbone import get_layout, get_model_args, model_on_meta

# Of a device's memory, what is left to the allocator's fragmentation, the libraries and the collectives' buffers.
_RESERVE = 0.1
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "gathered": "gathered parameters",
    "gathered_gradients": "gradients being reduced",
    "activations": "activations",
    "head": "logits and gradient of the head",
    "fast_weights": "fast weights",
}
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
    """Estimate what a configuration needs on so many ranks.

    Args:
        layers: if not as many as the flavour has.
        node_size: ranks of a node; all of them if None.
        documents: in the fullest row of packed ones.

    Raises:
        UserError: if it does not fit that number.
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


def table(config: JobConfig, found: dict[int, Estimate | UserError], device_memory: float, speeds: Speeds) -> str:
    """Lay out the estimates side by side, and below them what does not fit or is slow.

    Args:
        config: before `launch.resolve`, as the user knows it.
        found: estimates by number of ranks.
        device_memory: GiB.
    """
    good = {size: x for size, x in found.items() if isinstance(x, Estimate)}
    lines = []
    if good:
        one = next(iter(good.values()))
        trained = f", {one.trained:,} trained" if one.trained != one.parameters else ""
        active = f", {one.active:,} for each token" if one.active != one.parameters else ""
        lines.append(f"{config.model.name} {config.model.flavor}: {one.parameters:,} parameters{active}{trained}")
        rows: list[tuple[str, list[str]]] = [("ranks", [f"{size}" for size in good])]
        if any(x.replicas > 1 for x in good.values()):
            rows.append(("replicas of the parameters", [f"{x.replicas}" for x in good.values()]))
        rows.append(("sequences of a micro-batch", [f"{x.sequences}" for x in good.values()]))
        rows.append(("micro-batches of a step", [f"{x.micro_batches}" for x in good.values()]))
        rows += [
            (label, [f"{getattr(x.memory, key) / 2**30:.2f}" for x in good.values()]) for key, label in _MEMORY.items()
        ]
        rows.append(("memory of a rank (GiB)", [f"{x.memory.total / 2**30:.1f}" for x in good.values()]))
        rows += [
            (label, [f"{getattr(x.communication, key) / 1e9:.2f}" for x in good.values()])
            for key, label in _COMMUNICATION.items()
            if any(getattr(x.communication, key) for x in good.values())
        ]
        rows.append(("sent by a rank in a step (GB)", [f"{x.communication.total / 1e9:.1f}" for x in good.values()]))
        times = [step_time(x, speeds) for x in good.values()]
        rows.append(("compute of a step (s)", [f"{time.compute:.2f}" for time in times]))
        rows.append(("sending within nodes (s)", [f"{time.within_nodes:.2f}" for time in times]))
        rows.append(("sending across nodes (s)", [f"{time.across_nodes:.2f}" for time in times]))
        lines += [f"{label:<34}{''.join(f'{value:>10}' for value in values)}" for label, values in rows]
    for size, x in found.items():
        if isinstance(x, UserError):
            lines.append(f"{size} ranks: {x}")
            continue
        if slow := warning(config, x, speeds):
            lines.append(f"{size} ranks: {slow}")
        if not fits(x, device_memory):
            lines.append(
                f"{size} ranks: {x.memory.total / 2**30:.1f} GiB will not fit on devices of {device_memory:g} GiB, of "
                f"which a tenth is left to the allocator and the libraries; {_remedy(config, x)}."
            )
    return "\n".join(lines)


def fits(x: Estimate, device_memory: float) -> bool:
    """Return whether a rank's memory fits on a device (GiB), with a reserve."""
    return x.memory.total <= (1 - _RESERVE) * device_memory * 2**30


def _remedy(config: JobConfig, x: Estimate) -> str:
    """Say what would help most against the largest part."""
    parts = vars(x.memory)
    largest = max(parts, key=lambda key: parts[key])
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
        return f'lower {lower}, or set granularity = "batch"'
    if largest == "gathered" and config.parallelism.fsdp_reshard_after_forward == "never":
        return 'set parallelism.fsdp_reshard_after_forward = "default"'
    return "raise parallelism.tensor_parallel_degree, or lower parametric_memory.layer_fraction"


def _local_batch_size(config: JobConfig) -> str:
    """Return the key that bounds the sequences of a micro-batch."""
    return "max_local_batch_size" if config.training.local_batch_size == -1 else "local_batch_size"
