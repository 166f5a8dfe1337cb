"""Bench sections: speed and memory of whole models and of several row lengths, measured with tools/bench.py."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from memdlm_dist.performance.gpu_check.figures import figures
from memdlm_dist.performance.gpu_check.section import Context, Failure, OutOfMemory, Skip, last_words, read_json


@dataclass(frozen=True)
class _Model:
    """Model to measure: configuration keys, number of layers, and the depths to extrapolate from if it does not fit."""

    arguments: tuple[str, ...]
    layers: int
    # Extrapolation assumes the whole model's share of layers with fast weights, so every depth keeps that share.
    reduced_depths: tuple[tuple[int, ...], ...]
    debug: tuple[str, ...]


EXPERTS = ("--model.name", "llada_moe", "--model.flavor", "7B-A1B")
EXPERTS_DEBUG = ("--model.name", "llada_moe")
LORA = ("--model.converters", "lora")
DENSE_8B = _Model((), 32, ((24, 16), (16, 8), (8,)), ())
MOE_7B = _Model(EXPERTS, 16, ((8,),), EXPERTS_DEBUG)
_DEBUG_LAYERS = 4
BY_ESTIMATE = "by the estimate of tools/dry_run.py"


def fits(context: Context, config: str, *arguments: str) -> bool:
    """Return whether tools/dry_run.py estimates that a configuration fits on the devices; True without devices."""
    if not context.environment["devices"]:
        return True
    memory = min(device["memory_bytes"] for device in context.environment["devices"]) / 2**30
    path = context.log.with_suffix(".dry_run.json")
    path.unlink(missing_ok=True)
    status, output = context.status(
        sys.executable, "tools/dry_run.py", config, "--world-size", str(context.devices), "--device-memory",
        f"{memory:.1f}", "--json", str(path), *arguments,
    )  # fmt: skip
    try:
        json.loads(path.read_text())[str(context.devices)]["memory"]
    except (OSError, ValueError, LookupError, TypeError):  # status 1 also means that the estimate itself failed
        raise Failure(f"dry_run.py ended with status {status}: {last_words(output)}") from None
    return status == 0


def _bench(context: Context, config: str, arguments: Iterable[str], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Run tools/bench.py and return its JSON result."""
    path = context.log.with_suffix(".bench.json")
    path.unlink(missing_ok=True)
    context.python(
        "tools/bench.py", config, "--processes", str(context.devices), "--rounds", str(rounds), "--warm-up",
        str(warm_up), "--json", str(path), *arguments,
    )  # fmt: skip
    result: dict[str, Any] = read_json(path)
    return result


def bench_model(model: _Model, lora: bool, kernels: bool = False) -> Callable[[Context], None]:
    """Return a section function that measures a model: all layers if they fit, else smaller depths."""

    def run(context: Context) -> None:
        config = "train_configs/debug.toml" if context.debug else "train_configs/bench_8b.toml"
        arguments = [*(model.debug if context.debug else model.arguments), *(LORA if lora else ())]
        all_layers = _DEBUG_LAYERS if context.debug else model.layers
        rounds, warm_up = (1, 1) if context.debug else (3, 2) if context.quick else (5, 2)
        table = context.log.with_suffix(".kernels.txt")
        table.unlink(missing_ok=True)
        for depths in ((all_layers,), *(() if context.debug else model.reduced_depths)):
            if not fits(context, config, "--layers", str(depths[0]), *arguments):
                continue
            context.numbers.update(whole_layers=all_layers, benches=[])
            try:
                for layers in depths:
                    profile = ["--profile", str(table)] if kernels and layers == depths[0] else []
                    options = [*profile, "--layers", str(layers), *arguments]
                    result = _bench(context, config, options, rounds, warm_up)
                    context.numbers["benches"].append(result)
                    if profile:
                        context.numbers["kernels"] = [line.rstrip() for line in table.read_text().splitlines()[:18]]
            except OutOfMemory as error:  # the estimate was too low
                context.numbers["out_of_memory"] = str(error)
                continue
            return
        if "out_of_memory" in context.numbers:
            raise Failure(context.numbers["out_of_memory"])
        raise Skip(f"not even the smallest depth fits on the devices, {BY_ESTIMATE}")

    return run


def bench_headline(numbers: dict[str, Any]) -> str:
    """Return plain training's throughput, and ours over plain, as one line."""
    model = figures(numbers)
    if model is None:
        return ""
    return (
        f"{model.depth}: plain {model.tokens_per_second['plain']:,.0f} tokens/s/GPU, "
        f"ours {model.over_plain['ours']:.3f} times plain"
    )


def measure_mix(context: Context) -> None:
    """Measure fine-tuning rows of different lengths: padded to seq_len, in buckets, and grouped by length."""
    config, layers = ("train_configs/debug.toml", "2") if context.debug else ("train_configs/bench_8b.toml", "8")
    length = ["--training.seq_len", "256"] if context.debug else []
    rounds = 1 if context.debug else 2 if context.quick else 6
    context.numbers["mix"] = _bench(context, config, ["--mix", "--layers", layers, *length], rounds, warm_up=1)


def mix_headline(numbers: dict[str, Any]) -> str:
    """Return the step times relative to rows padded to seq_len, as one line."""
    relative = numbers.get("mix", {}).get("over_whole", {})
    return ", ".join(f"{name} {ratio:.3f}" for name, ratio in relative.items())


def measure_lengths(context: Context) -> None:
    """Measure several row lengths, a few per process: running out of memory loses only the lengths of one process."""
    groups: list[tuple[int, ...]]
    if context.debug:
        config, arguments, groups = "train_configs/debug.toml", ["--layers", "2"], [(64, 128)]
    else:
        config, arguments = "train_configs/bench_8b.toml", ["--layers", "8"]
        groups = [(4096, 8192, 16384), (32768,), (65536,), (131072,)]
        if context.quick:
            groups = [(4096, 16384), (65536,)]
    arguments += ["--training.local_batch_size", "1"]
    all_lengths = [length for lengths in groups for length in lengths]
    fitting = all_lengths
    while fitting and not fits(context, config, *arguments, "--training.seq_len", str(fitting[-1])):
        fitting = fitting[:-1]
    if not fitting:
        raise Skip(f"not even rows of {all_lengths[0]:,} tokens fit on a device, {BY_ESTIMATE}")
    if fitting != all_lengths:
        context.numbers["stopped"] = f"rows of {all_lengths[len(fitting)]:,} tokens do not fit, {BY_ESTIMATE}"
        groups = [kept for lengths in groups if (kept := tuple(x for x in lengths if x in fitting))]
    rows = context.numbers["lengths"] = []
    for lengths in groups:
        options = ["--lengths", *map(str, lengths), *arguments]
        began = time.monotonic()
        try:
            result = _bench(context, config, options, rounds=1 if context.debug else 2, warm_up=1)
        except OutOfMemory:
            if not rows:
                raise
            context.numbers["stopped"] = f"rows of {lengths[0]:,} tokens do not fit"
            return
        rows += result["lengths"]
        # Attention makes the next length take up to four times as long, not counting start-up and compilation.
        if lengths != groups[-1] and context.remaining < 2 * (time.monotonic() - began):
            context.numbers["stopped"] = f"no time was left for rows longer than {lengths[-1]:,} tokens"
            return


def lengths_headline(numbers: dict[str, Any]) -> str:
    """Return ours over plain on the longest measured rows, as one line."""
    if not numbers.get("lengths"):
        return ""
    last = numbers["lengths"][-1]
    return f"{last['length']:,} tokens: ours {last['ratio']['ours_over_plain']:.3f} times plain"
