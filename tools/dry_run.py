#!/usr/bin/env python
"""What a configuration needs on many ranks, told by one process: no weights, no accelerators, no data.

    python tools/dry_run.py train_configs/llada_8b_longalpaca.toml --world-size 8 32 256
    python tools/dry_run.py CONFIG --world-size 64 --device-memory 141 --parallelism.tensor_parallel_degree 2

Builds the model of full size on the meta device, spreads it over so many ranks of a backend that only pretends, and
prints parameters, the memory of one rank, what it sends in a step, and the seconds that a step computes and sends at
given speeds. Memory is in GiB (2^30 bytes), communication in GB (10^9 bytes). Estimates: the allocator's fragmentation
and the libraries' workspaces are not in them. Exit status 1 if a layout will not fit. Keys of the configuration can
follow: --section.key value.
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
    p = new_parser("dry_run.py", __doc__)
    p.add_argument("config", metavar="CONFIG", help="TOML file of the run")
    p.add_argument("--world-size", type=positive, nargs="+", required=True, metavar="N", help="numbers of ranks")
    p.add_argument(
        "--device-memory",
        type=float,
        default=80.0,
        metavar="GIB",
        help="of one device, in GiB (default: 80)",
    )
    p.add_argument(
        "--ranks-per-node", type=positive, default=8, metavar="N", help="at most so many of the ranks (default: 8)"
    )
    for name, default, unit, meaning in (
        ("tflops", 400.0, "TFLOP/S", "what a device computes of the step's matrix products"),
        ("intra", 450.0, "GB/S", "what a rank sends within a node"),
        ("inter", 50.0, "GB/S", "what a rank sends across nodes"),
    ):
        p.add_argument(
            f"--{name}", type=positive_number, default=default, metavar=unit, help=f"{meaning} (default: {default:g})"
        )
    p.add_argument("--layers", type=positive, metavar="N", help="number of layers, if not the flavour's")
    p.add_argument(
        "--documents",
        type=positive,
        default=1,
        metavar="N",
        help="in the fullest row of packed ones, as the shards' card says (default: 1)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return p


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    quiet()
    warnings.filterwarnings("ignore")  # of torch, about ranks that are not there
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    found: dict[int, Estimate | UserError] = {}
    for size in options.world_size:
        try:
            node = min(size, options.ranks_per_node)
            found[size] = forecast(config, size, options.layers, node, options.documents)
        except UserError as mistake:
            found[size] = mistake
    speeds = Speeds(options.tflops, options.intra, options.inter)
    print(table(config, found, options.device_memory, speeds))
    if options.json:
        numbers = {
            size: asdict(x) | {"seconds": asdict(step_time(x, speeds))} if isinstance(x, Estimate) else str(x)
            for size, x in found.items()
        }
        try:
            options.json.write_text(json.dumps(numbers, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{options.json} cannot be written ({error}); choose another file.") from None
    return int(not all(isinstance(x, Estimate) and fits(x, options.device_memory) for x in found.values()))


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
