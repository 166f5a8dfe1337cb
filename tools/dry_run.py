#!/usr/bin/env python
"""What a configuration needs on many ranks, told by one process: no weights, no accelerators, no data.

    python tools/dry_run.py train_configs/llada_8b_longalpaca.toml --world-size 8 32 256
    python tools/dry_run.py CONFIG --world-size 64 --device-memory 141 --parallelism.tensor_parallel_degree 2

Builds the model of full size on the meta device, spreads it over so many ranks of a backend that only pretends, and
prints parameters, the memory of one rank and what it sends in a step. Memory is in GiB (2^30 bytes), communication in
GB (10^9 bytes). Estimates: the allocator's fragmentation and the libraries' workspaces are not in them. Exit status 1
if a layout will not fit. Keys of the configuration can follow: --section.key value.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torchtitan.distributed.utils import init_fake_mode

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import check_layout, parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.inference.model_arguments import guarded, parse, positive, quiet
from memdlm_dist.models import backbone_args
from memdlm_dist.performance.estimate import Estimate, estimate
from memdlm_dist.training.backbone import layout_of, model_on_meta

# Of a device's memory, what is left to the allocator's fragmentation, the libraries and the collectives' buffers.
_RESERVE = 0.1
_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "gathered": "gathered: tail, head, two layers",
    "gathered_gradients": "gradients being reduced",
    "activations": "activations",
    "head": "logits, one chunk",
    "fast_weights": "fast weights",
}
_COMMUNICATION = {
    "gather": "FSDP all-gathers",
    "reduce": "FSDP reductions",
    "tensor": "tensor parallel",
    "context": "context parallel",
    "experts": "expert parallel",
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="dry_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    p.add_argument("--world-size", type=positive, nargs="+", required=True, metavar="N", help="numbers of ranks")
    p.add_argument(
        "--device-memory",
        type=float,
        default=80.0,
        metavar="GIB",
        help="of one device, in GiB (default: 80)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return p


def look(config: Any, world_size: int) -> Estimate:
    """What a configuration needs on so many ranks.

    Raises:
        UserError: if it does not fit that number.
    """
    check_layout.check_launch(config, world_size)
    args = backbone_args(config.model.name, config.model.flavor)
    check_layout.check_backbone(config, args, world_size)
    init_fake_mode(world_size)
    try:
        args.update_from_config(config)
        dims = layout_of(config, world_size)
        model = model_on_meta(config, args, dims)
        return estimate(model, args, dims, config)
    finally:
        dist.destroy_process_group()


def table(config: Any, found: dict[int, Estimate | UserError], device_memory: float) -> str:
    """The estimates side by side; what does not fit is said below."""
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
        elif not _fits(x, device_memory):
            lines.append(
                f"{size} ranks: {x.memory.total / 2**30:.1f} GiB will not fit on devices of {device_memory:g} GiB, of "
                f"which a tenth is left to the allocator and the libraries; {_remedy(config, x)}."
            )
    return "\n".join(lines)


def _fits(x: Estimate, device_memory: float) -> bool:
    return x.memory.total <= (1 - _RESERVE) * device_memory * 2**30


def _remedy(config: Any, x: Estimate) -> str:
    """What would help most against the largest part."""
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


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    quiet()
    warnings.filterwarnings("ignore")  # of torch, about ranks that are not there
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    found: dict[int, Estimate | UserError] = {}
    for size in options.world_size:
        try:
            found[size] = look(config, size)
        except UserError as mistake:
            found[size] = mistake
    print(table(config, found, options.device_memory))
    if options.json:
        numbers = {size: asdict(x) if isinstance(x, Estimate) else str(x) for size, x in found.items()}
        try:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{options.json} cannot be written ({error}); choose another file.") from None
    return int(not all(isinstance(x, Estimate) and _fits(x, options.device_memory) for x in found.values()))


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse(parser(), argv)
    return guarded(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
