"""Forecasts of a configuration on many ranks, made by one process: the estimates, side by side, and what would help."""

import torch.distributed as dist

from memdlm_dist.config import check_layout
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError
from memdlm_dist.performance.estimate import Estimate, estimate
from memdlm_dist.runtime.process_group import pretend
from memdlm_dist.training.backbone import layout_of, model_on_meta, sizes_of

# Of a device's memory, what is left to the allocator's fragmentation, the libraries and the collectives' buffers.
_RESERVE = 0.1
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "gathered": "gathered: tail, head, two layers",
    "gathered_gradients": "gradients being reduced",
    "activations": "activations",
    "head": "logits and gradient of the head",
    "fast_weights": "fast weights",
}
_COMMUNICATION = {
    "gather": "FSDP all-gathers",
    "reduce": "FSDP reductions",
    "tensor": "tensor parallel",
    "context": "context parallel",
    "experts": "expert parallel",
}


def forecast(config: JobConfig, world_size: int, layers: int | None = None) -> Estimate:
    """Estimate what a configuration needs on so many ranks.

    Args:
        layers: if not as many as the flavour has.

    Raises:
        UserError: if it does not fit that number.
    """
    check_layout.check_launch(config, world_size)
    args = sizes_of(config)
    args.n_layers = layers or args.n_layers
    check_layout.check_backbone(config, args, world_size)
    pretend(world_size)
    try:
        dims = layout_of(config, world_size)
        model = model_on_meta(config, args, dims)
        return estimate(model, args, dims, config)
    finally:
        dist.destroy_process_group()


def table(config: JobConfig, found: dict[int, Estimate | UserError], device_memory: float) -> str:
    """Lay out the estimates side by side, and below them what does not fit."""
    good = {size: x for size, x in found.items() if isinstance(x, Estimate)}
    lines = []
    if good:
        one = next(iter(good.values()))
        trained = f", {one.trained:,} trained" if one.trained != one.parameters else ""
        active = f", {one.active:,} for each token" if one.active != one.parameters else ""
        lines.append(f"{config.model.name} {config.model.flavor}: {one.parameters:,} parameters{active}{trained}")
        rows: list[tuple[str, list[str]]] = [("ranks", [f"{size}" for size in good])]
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
        lines += [f"{label:<34}{''.join(f'{value:>10}' for value in values)}" for label, values in rows]
    for size, x in found.items():
        if isinstance(x, UserError):
            lines.append(f"{size} ranks: {x}")
        elif not fits(x, device_memory):
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
        if config.training.local_batch_size > 1:
            return "lower training.local_batch_size"
        return "raise parallelism.context_parallel_degree or tensor_parallel_degree"
    if largest in ("weights", "gradients", "optimizer"):
        return 'shard over more ranks, or train adapters (model.converters = ["lora"])'
    if largest == "fast_weights":
        return 'lower parametric_memory.layer_fraction or training.local_batch_size, or set granularity = "batch"'
    return "raise parallelism.tensor_parallel_degree, or lower parametric_memory.layer_fraction"
