"""Plain masked diffusion, straightforward MemDLM and ours, in turn on one sharded model: time, memory, communication.

    python tools/bench.py [CONFIG.toml] [options] [--section.key value ...]
    python tools/bench.py [CONFIG.toml] --lengths 512 1024 2048 [options] ...    # plain and ours against length

CONFIG.toml is a training configuration (default: train_configs/bench_cpu.toml); its backbone, batch, layout,
precision, checkpointing and compilation are measured, on random weights and tokens. A step is forward, backward,
clipping and optimizer. Each round takes one step of each kind on the same batch; a ratio is the median over the
rounds of the ratio within a round. The straightforward step is that of tests/straightforward.py.

Starts its own processes; under torchrun it is one of them.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import get_peak_flops

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import check_layout, parse_config
from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.models import backbone_args
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.performance.bench_steps import DATA_PARALLEL, KINDS, Bench
from memdlm_dist.performance.collectives import by_kind
from memdlm_dist.performance.peak_memory import peak_memory
from memdlm_dist.runtime.device import device_module, device_type

DEFAULT_CONFIG = Path(__file__).parent.parent / "train_configs/bench_cpu.toml"


def measure(
    bench: Bench, rounds: int, warm_up: int, profile: str | None = None, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Everything that is reported, on every rank."""
    config = bench.config
    optimizer = build_optimizers([bench.model], config.optimizer, bench.dims)
    parameters = list(bench.model.parameters())

    def step(kind: str, number: int, batch: MicroBatch) -> None:
        loss, _ = bench.loss_sum(kind, batch, number)
        (loss / batch.maskable).backward()
        dist_utils.clip_grad_norm_(parameters, config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    flops: dict[str, list[float]] = {"outer": [], "inner": []}
    recomputation = Recomputation(config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option)
    for number in range(warm_up + rounds):
        batch = bench.batch(number)
        for place in range(len(kinds)):
            kind = kinds[(place + number) % len(kinds)]
            taken = _timed(partial(step, kind, number, batch))
            if number >= warm_up:
                seconds[kind].append(taken)
        if number >= warm_up:
            of_step = step_flops(bench.args, batch, bench.objective.memory, recomputation)
            flops["outer"].append(of_step.outer * bench.dims.cp)
            flops["inner"].append(of_step.inner * bench.dims.cp)
        _say(f"round {number + 1} of {warm_up + rounds}" + (" (warm-up)" if number < warm_up else ""))

    counted = {kind: bench.collectives(kind) for kind in kinds}
    data_parallel = {kind: by_kind(found.on(*bench.groups(*DATA_PARALLEL))) for kind, found in counted.items()}
    tensor_parallel = {kind: by_kind(found.on(*bench.groups("tp"))) for kind, found in counted.items()}
    memory = {kind: _largest(peak_memory(partial(step, kind, 0, bench.batch(0)))) for kind in kinds}
    if profile is not None:
        _profile(lambda: step("ours", 0, bench.batch(0)), profile)

    def by_kind_of_step(value: Callable[[str], Any]) -> dict[str, Any]:
        return {kind: value(kind) for kind in kinds}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    tokens = config.training.local_batch_size * config.training.seq_len  # of a data-parallel rank
    replicas = bench.dims.dp_replicate * bench.dims.dp_shard
    peak = get_peak_flops(device_module().get_device_name()) if device_type() != "cpu" else None
    model_flops = bench.flops_per_token * tokens
    return {
        "device": device_module().get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "rounds": rounds,
        "step_seconds": median,
        "step_seconds_range": by_kind_of_step(lambda kind: [min(seconds[kind]), max(seconds[kind])]),
        "ratio": {
            f"{above}_over_{below}": ratio(above, below)
            for above, below in (("ours", "plain"), ("straightforward", "plain"), ("ours", "straightforward"))
            if {above, below} <= set(kinds)
        },
        "tokens_per_second": by_kind_of_step(lambda kind: tokens * replicas / median[kind]),
        "all_gathers": by_kind_of_step(lambda kind: data_parallel[kind]["all_gather"]),
        "reduce_scatters": by_kind_of_step(lambda kind: data_parallel[kind]["reduce_scatter"]),
        "all_reduces": by_kind_of_step(lambda kind: data_parallel[kind]["all_reduce"]),
        "tensor_parallel_collectives": by_kind_of_step(lambda kind: dict(tensor_parallel[kind])),
        "peak_bytes": by_kind_of_step(lambda kind: memory[kind][0]),
        "peak_bytes_within_step": by_kind_of_step(lambda kind: memory[kind][1]),
        "flops": {
            "model": model_flops,
            "hardware_outer": statistics.median(flops["outer"]),
            "hardware_inner": statistics.median(flops["inner"]),
        },
        "hardware_flops_ratio": statistics.median(
            (a + b) / a for a, b in zip(flops["outer"], flops["inner"], strict=True)
        ),
        "mfu": by_kind_of_step(
            lambda kind: None if peak is None else model_flops / (bench.dims.tp * bench.dims.cp) / median[kind] / peak
        ),
    }


def _timed(run: Callable[[], None]) -> float:
    dist.barrier()
    _synchronise()
    began = time.perf_counter()
    run()
    _synchronise()
    dist.barrier()
    return time.perf_counter() - began


def _synchronise() -> None:
    if device_type() != "cpu":
        device_module().synchronize()


def _largest(values: tuple[int, ...]) -> list[int]:
    """Of each value, the largest of any rank."""
    tensor = torch.tensor(values, device=device_type())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _profile(run: Callable[[], None], path: str) -> None:
    """Write a table of one step's operators, or kernels, by the time they take."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type() == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        _synchronise()
    order = f"self_{device_type()}_time_total"
    if dist.get_rank() == 0:
        Path(path).write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))


def table(result: dict[str, Any]) -> str:
    """The results for people."""
    seconds, spread = result["step_seconds"], result["step_seconds_range"]
    shares = {"plain": 1.0} | {kind: result["ratio"][f"{kind}_over_plain"] for kind in KINDS[1:]}
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("step, median (s)", lambda kind: f"{seconds[kind]:.3f}"),
        ("  fastest to slowest", lambda kind: f"{spread[kind][0]:.3f} to {spread[kind][1]:.3f}"),
        ("  over plain", lambda kind: f"{shares[kind]:.3f}"),
        ("tokens/s", lambda kind: f"{result['tokens_per_second'][kind]:,.0f}"),
        ("peak memory of a rank (MiB)", lambda kind: f"{result['peak_bytes'][kind] / 2**20:,.0f}"),
        ("  of it, within the step", lambda kind: f"{result['peak_bytes_within_step'][kind] / 2**20:,.0f}"),
        ("data-parallel all-gathers", lambda kind: str(result["all_gathers"][kind])),
        ("data-parallel reduce-scatters", lambda kind: str(result["reduce_scatters"][kind])),
        ("data-parallel all-reduces", lambda kind: str(result["all_reduces"][kind])),
        ("tensor-parallel collectives", lambda kind: str(sum(result["tensor_parallel_collectives"][kind].values()))),
    ]
    if result["mfu"]["plain"] is not None:
        rows.append(("MFU, by plain model FLOPs (%)", lambda kind: f"{100 * result['mfu'][kind]:.1f}"))
    lines = [f"{'':<32}" + "".join(f"{kind:>18}" for kind in KINDS)]
    lines += [f"{name:<32}" + "".join(f"{value(kind):>18}" for kind in KINDS) for name, value in rows]
    flops = result["flops"]
    lines.append(
        f"TFLOP a micro-batch: model {flops['model'] / 1e12:.3f}; hardware {flops['hardware_outer'] / 1e12:.3f}, "
        f"and for the inner loop {flops['hardware_inner'] / 1e12:.3f}: x {result['hardware_flops_ratio']:.3f}"
    )
    lines.append(f"ours over straightforward: {result['ratio']['ours_over_straightforward']:.3f}")
    return "\n".join(lines)


def sweep(config: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain and our steps on rows of several lengths, on every rank."""
    results = []
    for length in options.lengths:
        _say(f"rows of {length} tokens")
        config.training.seq_len = length
        bench = Bench.build(config, options.layers)
        found = measure(bench, options.rounds, options.warm_up, kinds=("plain", "ours"))
        results.append({"length": length, **found})
        del bench
        gc.collect()
    return results


def table_of_lengths(results: Sequence[dict[str, Any]]) -> str:
    """The results of a sweep for people."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens of a row": lambda found: f"{found['length']:,}",
        "plain (s)": lambda found: f"{found['step_seconds']['plain']:.2f}",
        "ours (s)": lambda found: f"{found['step_seconds']['ours']:.2f}",
        "ours/plain": lambda found: f"{found['ratio']['ours_over_plain']:.3f}",
        "by FLOPs": lambda found: f"{found['hardware_flops_ratio']:.3f}",
        "plain (MiB)": lambda found: f"{found['peak_bytes']['plain'] / 2**20:,.0f}",
        "ours (MiB)": lambda found: f"{found['peak_bytes']['ours'] / 2**20:,.0f}",
        "within step": lambda found: f"{found['peak_bytes_within_step']['plain'] / 2**20:,.0f}",
        "of ours": lambda found: f"{found['peak_bytes_within_step']['ours'] / 2**20:,.0f}",
    }
    lines = ["".join(f"{name:>17}" for name in columns)]
    lines += ["".join(f"{value(found):>17}" for value in columns.values()) for found in results]
    return "\n".join(lines)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """One rank's part.

    Raises:
        UserError: for a configuration that cannot be measured.
    """
    config = _configuration(options.config, overrides, int(os.environ["WORLD_SIZE"]))
    device_module().set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device_type() == "cpu" else None)
    result = {"config": str(options.config), "overrides": list(overrides), "layers": options.layers}
    if options.lengths:
        result["lengths"] = sweep(config, options)
        text = table_of_lengths(result["lengths"])
    else:
        bench = Bench.build(config, options.layers)
        result |= measure(bench, options.rounds, options.warm_up, options.profile)
        text = table(result)
    if dist.get_rank() == 0:
        print(text, flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"Written to {options.json}.", flush=True)
    dist.destroy_process_group()


def _check_output(path: str | None) -> None:
    """A file can be written there; makes its folder."""
    try:
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); choose another file.") from None


def _configuration(path: Path, overrides: Sequence[str], world_size: int, length: int | None = None) -> Any:
    config = parse_config.parse(["--job.config_file", str(path), *overrides])
    config.training.seq_len = length or config.training.seq_len
    check_layout.check_launch(config, world_size)
    check_layout.check_device(config, device_type())
    args = backbone_args(config.model.name, config.model.flavor)
    check_layout.check_backbone(config, args, world_size)
    if not config.parametric_memory.enable:
        raise UserError("parametric_memory.enable is false, so there is nothing to compare; set it to true.")
    return config


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        usage="bench.py [CONFIG.toml] [options] [--section.key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The file comes first, or the value of a configuration's key could be taken for it.
    given = [Path(argument) for argument in argv[:1] if not argument.startswith("-")]
    parser.set_defaults(config=given[0] if given else DEFAULT_CONFIG)

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

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


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options, overrides = _options(argv)
    try:
        if "RANK" in os.environ:
            run(options, overrides)
            return 0
        processes = options.processes or torch.accelerator.device_count() or 2
        # Mistakes are found here, before anything is started.
        for length in options.lengths or [None]:
            _configuration(options.config, overrides, processes, length)
        _check_output(options.json)
        _check_output(options.profile)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return EXIT_STATUS
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--local-ranks-filter=0", __file__, *argv,
    ]  # fmt: skip
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main())
