"""Benchmark of plain, straightforward and our steps, in alternating rounds: time, memory, communication, tables."""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools.utils import get_peak_flops

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.performance.bench_steps import DATA_PARALLEL, KINDS, Bench
from memdlm_dist.performance.collectives import by_kind
from memdlm_dist.performance.peak_memory import peak_memory
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.training.backbone import get_lora

_A100_PEAK = 312e12  # FLOP/s; torchtitan's `get_peak_flops` also returns it for unknown devices


def measure(
    bench: Bench, rounds: int, warm_up: int, profile: str | None = None, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Run the rounds and return the results of the report; all ranks must call this.

    Args:
        bench: the sharded backbone.
        rounds: measured rounds, of one step of each kind.
        warm_up: earlier rounds, which are not measured.
        profile: file for a profile of one of our steps; None for no profile.
        kinds: kinds of step.
    """
    config = bench.config
    step = bench.optimizer_step()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    flops: dict[str, list[float]] = {"outer": [], "inner": []}
    recomputation = Recomputation(config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option)
    frozen = get_lora(config) is not None
    for number in range(warm_up + rounds):
        batch = bench.batch(number)
        for offset in range(len(kinds)):
            kind = kinds[(offset + number) % len(kinds)]
            duration = timed(partial(step, kind, number, batch))
            if number >= warm_up:
                seconds[kind].append(duration)
        if number >= warm_up:
            micro_batch_flops = step_flops(bench.args, batch, bench.objective.memory, recomputation, frozen)
            flops["outer"].append(micro_batch_flops.outer * bench.dims.cp)
            flops["inner"].append(micro_batch_flops.inner * bench.dims.cp)
        say(f"round {number + 1} of {warm_up + rounds}" + (" (warm-up)" if number < warm_up else ""))

    recorded = {kind: bench.collectives(kind) for kind in kinds}
    data_parallel = {kind: by_kind(calls.on(*bench.groups(*DATA_PARALLEL))) for kind, calls in recorded.items()}
    tensor_parallel = {kind: by_kind(calls.on(*bench.groups("tp"))) for kind, calls in recorded.items()}
    memory = {kind: _largest(peak_memory(partial(step, kind, 0, bench.batch(0)))) for kind in kinds}
    if profile is not None:
        _profile(lambda: step("ours", 0, bench.batch(0)), profile)

    def per_kind(value: Callable[[str], Any]) -> dict[str, Any]:
        return {kind: value(kind) for kind in kinds}

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    tokens = config.training.local_batch_size * config.training.seq_len  # per data-parallel rank
    replicas = bench.dims.dp_replicate * bench.dims.dp_shard
    peak = peak_flops(device_module().get_device_name()) if device_type() != "cpu" else None
    model_flops = bench.flops_per_token * tokens
    return {
        "device": device_module().get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "rounds": rounds,
        "step_seconds": median,
        "step_seconds_range": per_kind(lambda kind: [min(seconds[kind]), max(seconds[kind])]),
        "ratio": {
            f"{above}_over_{below}": ratio(above, below)
            for above, below in (("ours", "plain"), ("straightforward", "plain"), ("ours", "straightforward"))
            if {above, below} <= set(kinds)
        },
        "tokens_per_second": per_kind(lambda kind: tokens * replicas / median[kind]),
        "all_gathers": per_kind(lambda kind: data_parallel[kind]["all_gather"]),
        "reduce_scatters": per_kind(lambda kind: data_parallel[kind]["reduce_scatter"]),
        "all_reduces": per_kind(lambda kind: data_parallel[kind]["all_reduce"]),
        "tensor_parallel_collectives": per_kind(lambda kind: dict(tensor_parallel[kind])),
        "peak_bytes": per_kind(lambda kind: memory[kind][0]),
        "peak_bytes_within_step": per_kind(lambda kind: memory[kind][1]),
        "flops": {
            "model": model_flops,
            "hardware_outer": statistics.median(flops["outer"]),
            "hardware_inner": statistics.median(flops["inner"]),
        },
        "hardware_flops_ratio": statistics.median(
            (a + b) / a for a, b in zip(flops["outer"], flops["inner"], strict=True)
        ),
        "mfu": per_kind(
            lambda kind: None if peak is None else model_flops / (bench.dims.tp * bench.dims.cp) / median[kind] / peak
        ),
    }


def peak_flops(device: str) -> float | None:
    """Return a device's peak FLOP/s by its name; None for a MIG slice or a device unknown to torchtitan."""
    peak: float = get_peak_flops(device)
    unknown = peak == _A100_PEAK and "A100" not in device
    return None if unknown or "MIG" in device else peak


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that `run` takes on the slowest rank."""
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
    """Return the maximum of each value over all ranks."""
    tensor = torch.tensor(values, device=device_type())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _profile(run: Callable[[], None], path: str) -> None:
    """Write a table of one step's operators or kernels, sorted by time; on rank 0 only."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device_type() == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        _synchronise()
    order = f"self_{device_type()}_time_total"
    if is_rank_0():
        Path(path).write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80))


def table(result: dict[str, Any]) -> str:
    """Format the results of `measure` as a table."""
    seconds, ranges = result["step_seconds"], result["step_seconds_range"]
    shares = {"plain": 1.0} | {kind: result["ratio"][f"{kind}_over_plain"] for kind in KINDS[1:]}
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("step, median (s)", lambda kind: f"{seconds[kind]:.3f}"),
        ("  fastest to slowest", lambda kind: f"{ranges[kind][0]:.3f} to {ranges[kind][1]:.3f}"),
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


def sweep(
    config: JobConfig, lengths: Sequence[int], rounds: int, warm_up: int, layers: int | None = None
) -> list[dict[str, Any]]:
    """Measure plain and our steps at several sequence lengths; all ranks must call this.

    Args:
        config: a resolved configuration; its `training.seq_len` is changed.
        lengths: values of seq_len.
        rounds: measured rounds for each length.
        warm_up: earlier rounds, which are not measured.
        layers: number of layers; None for the flavour's.

    Returns:
        The results of `measure` for each length, with the key "length".
    """
    results = []
    for length in lengths:
        say(f"rows of {length} tokens")
        config.training.seq_len = length
        bench = Bench.build(config, layers)
        result = measure(bench, rounds, warm_up, kinds=("plain", "ours"))
        results.append({"length": length, **result})
        del bench
        gc.collect()
    return results


def table_of_lengths(results: Sequence[dict[str, Any]]) -> str:
    """Format the results of `sweep` as a table."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens of a row": lambda result: f"{result['length']:,}",
        "plain (s)": lambda result: f"{result['step_seconds']['plain']:.2f}",
        "ours (s)": lambda result: f"{result['step_seconds']['ours']:.2f}",
        "ours/plain": lambda result: f"{result['ratio']['ours_over_plain']:.3f}",
        "by FLOPs": lambda result: f"{result['hardware_flops_ratio']:.3f}",
        "plain (MiB)": lambda result: f"{result['peak_bytes']['plain'] / 2**20:,.0f}",
        "ours (MiB)": lambda result: f"{result['peak_bytes']['ours'] / 2**20:,.0f}",
        "within step": lambda result: f"{result['peak_bytes_within_step']['plain'] / 2**20:,.0f}",
        "of ours": lambda result: f"{result['peak_bytes_within_step']['ours'] / 2**20:,.0f}",
    }
    lines = ["".join(f"{name:>17}" for name in columns)]
    lines += ["".join(f"{value(result):>17}" for value in columns.values()) for result in results]
    return "\n".join(lines)


def say(text: str) -> None:
    """Print progress to stderr, on rank 0 only."""
    if is_rank_0():
        print(text, file=sys.stderr, flush=True)
