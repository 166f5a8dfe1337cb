#!/usr/bin/env python
r"""Estimate memory, communication and step time of a configuration on many ranks, without weights, GPUs or data.

Examples:
  python tools/dry_run.py train_configs/llada_8b_longalpaca.toml --world-size 8 32
  python tools/dry_run.py train_configs/llada_8b_128k.toml --world-size 64 --device-memory 141 \
      --parallelism.tensor_parallel_degree 2

One process builds the full model on the meta device and shards it over the ranks of a fake process group. For each
number of ranks the table shows parameters, memory of one rank, the data that it sends in a step, and the seconds of
compute and communication at the given speeds. Memory is in GiB (2^30 bytes), communication in GB (10^9 bytes). The
estimates do not include fragmentation of the allocator or workspaces of libraries. Exit status 1 if a layout does not
fit. Override configuration keys with --section.key value.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.performance.estimate import Estimate
from memdlm_dist.performance.forecast import fits, forecast, table
from memdlm_dist.performance.step_time import Speeds, step_time
from memdlm_dist.runtime.entry_point import (
    guarded,
    new_parser,
    parse_with_overrides,
    positive,
    positive_number,
    quiet,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("dry_run.py", __doc__)
    p.usage = "dry_run.py CONFIG --world-size N [N ...] [options] [--section.key value ...]"
    model = p.add_argument_group("model")
    model.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    model.add_argument("--layers", type=positive, metavar="N", help="number of layers (default: the flavour's)")
    layout = p.add_argument_group("layout")
    layout.add_argument(
        "--world-size", type=positive, nargs="+", required=True, metavar="N", help="numbers of ranks to estimate"
    )
    layout.add_argument(
        "--ranks-per-node", type=positive, default=8, metavar="N", help="maximum number of ranks per node (default: 8)"
    )
    data = p.add_argument_group("data")
    data.add_argument(
        "--documents",
        type=positive,
        default=1,
        metavar="N",
        help="maximum number of documents in a packed row, from the shards' memdlm.json (default: 1)",
    )
    hardware = p.add_argument_group("hardware")
    hardware.add_argument(
        "--device-memory", type=float, default=80.0, metavar="GIB", help="memory of a device in GiB (default: 80)"
    )
    for name, default, unit, meaning in (
        ("tflops", 400.0, "TFLOP/S", "matrix-product speed of a device in TFLOP/s"),
        ("intra", 450.0, "GB/S", "send bandwidth of a rank within its node in GB/s"),
        ("inter", 50.0, "GB/S", "send bandwidth of a rank across nodes in GB/s"),
    ):
        hardware.add_argument(
            f"--{name}", type=positive_number, default=default, metavar=unit, help=f"{meaning} (default: {default:g})"
        )
    output = p.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers as JSON (default: none)")
    return p


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the table and return the exit status: 1 if a layout fails or does not fit.

    Raises:
        UserError: if the JSON file cannot be written.
    """
    quiet()
    warnings.filterwarnings("ignore")  # torch warns about the ranks that do not exist
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    estimates: dict[int, Estimate | UserError] = {}
    for size in options.world_size:
        try:
            ranks_per_node = min(size, options.ranks_per_node)
            estimates[size] = forecast(config, size, options.layers, ranks_per_node, options.documents)
        except UserError as error:
            estimates[size] = error
    speeds = Speeds(options.tflops, options.intra, options.inter)
    print(table(config, estimates, options.device_memory, speeds))
    if options.json:
        numbers = {
            size: asdict(x) | {"seconds": asdict(step_time(x, speeds))} if isinstance(x, Estimate) else str(x)
            for size, x in estimates.items()
        }
        try:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{options.json} cannot be written ({error}); choose another file.") from None
    return int(not all(isinstance(x, Estimate) and fits(x, options.device_memory) for x in estimates.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
