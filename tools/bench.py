"""Plain masked diffusion, straightforward MemDLM and ours, in turn on one sharded model: time, memory, communication.

    python tools/bench.py [CONFIG.toml] [options] [--section.key value ...]
    python tools/bench.py [CONFIG.toml] --lengths 512 1024 2048 [options] ...    # plain and ours against length

CONFIG.toml is a training configuration (default: train_configs/bench_cpu.toml); its backbone, batch, layout,
precision, checkpointing and compilation are measured, on random weights and tokens. A step is forward, backward,
clipping and optimizer. Each round takes one step of each kind on the same batch; a ratio is the median over the
rounds of the ratio within a round. The straightforward step is that of performance/straightforward.py.

Starts its own processes; under torchrun it is one of them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import check_layout, launch, parse_config
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError
from memdlm_dist.models import backbone_args
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.measure import measure, sweep, table, table_of_lengths
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.runtime.entry_point import guarded, new_parser, positive
from memdlm_dist.runtime.process_environment import set_process_environment
from memdlm_dist.runtime.process_group import Processes, launched_processes
from memdlm_dist.runtime.rank_0 import is_rank_0

DEFAULT_CONFIG = Path(__file__).parent.parent / "train_configs/bench_cpu.toml"


def run(options: argparse.Namespace, argv: Sequence[str], overrides: Sequence[str]) -> int:
    """Measure as one rank.

    Raises:
        UserError: for a configuration that cannot be measured.
    """
    config = _configuration(options.config, overrides, launched_processes())
    device_module().set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device_type() == "cpu" else None)
    result = {"config": str(options.config), "overrides": list(overrides), "layers": options.layers}
    if options.lengths:
        result["lengths"] = sweep(config, options.lengths, options.rounds, options.warm_up, options.layers)
        text = table_of_lengths(result["lengths"])
    else:
        bench = Bench.build(config, options.layers)
        result |= measure(bench, options.rounds, options.warm_up, options.profile)
        text = table(result)
    if is_rank_0():
        print(text, flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"Written to {options.json}.", flush=True)
    dist.destroy_process_group()
    return 0


def _check_output(path: str | None) -> None:
    """A file can be written there; makes its folder."""
    try:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another file.") from None


def _configuration(path: Path, overrides: Sequence[str], processes: Processes, length: int | None = None) -> JobConfig:
    config = parse_config.parse(["--job.config_file", str(path), *overrides])
    config.training.seq_len = length or config.training.seq_len
    config = launch.resolve(config, *processes)
    check_layout.check_device(config, device_type())
    args = backbone_args(config.model.name, config.model.flavor)
    check_layout.check_backbone(config, args)
    if not config.parametric_memory.enable:
        raise UserError("parametric_memory.enable is false, so there is nothing to compare; set it to true.")
    return config


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser("bench.py", __doc__)
    parser.usage, parser.allow_abbrev = "bench.py [CONFIG.toml] [options] [--section.key value ...]", False
    # The file comes first, or the value of a configuration's key could be taken for it.
    given = [Path(argument) for argument in argv[:1] if not argument.startswith("-")]
    parser.set_defaults(config=given[0] if given else DEFAULT_CONFIG)

    parser.add_argument("--rounds", type=positive, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--warm-up", type=positive, default=2, help="rounds before them (default: 2)")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="N", help="measure plain and ours on rows of so many tokens each"
    )
    parser.add_argument("--layers", type=positive, help="number of layers, if not the flavour's")
    parser.add_argument("--processes", type=positive, help="default: all accelerators, or 2 without any")
    parser.add_argument("--json", default="outputs/bench.json", help="default: outputs/bench.json; '' writes none")
    parser.add_argument("--profile", metavar="FILE", help="also write a table of one step's operators or kernels")
    return parser.parse_known_args(argv[len(given) :])


def start(options: argparse.Namespace, argv: Sequence[str], overrides: Sequence[str]) -> int:
    """Start the processes that measure, once nothing is wrong with what is asked."""
    processes = options.processes or torch.accelerator.device_count() or 2
    for length in options.lengths or [None]:
        _configuration(options.config, overrides, Processes(processes, processes), length)
    _check_output(options.json)
    _check_output(options.profile)
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--local-ranks-filter=0", __file__, *argv,
    ]  # fmt: skip
    set_process_environment(processes)
    return subprocess.run(command).returncode


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options, overrides = _options(argv)
    if "RANK" not in os.environ:
        return guarded(lambda: start(options, argv, overrides))
    # Only rank 0 is shown: what another rank fails of reaches torchrun by the error file, and is shown at the end.
    return guarded(lambda: record(run)(options, argv, overrides) or 0)


if __name__ == "__main__":
    sys.exit(main())
