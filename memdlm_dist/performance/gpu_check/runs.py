"""Run sections: short trainings of each production path with launch/train.sh, and decoding with a checkpoint."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.performance.gpu_check.benches import BY_ESTIMATE, EXPERTS, EXPERTS_DEBUG, LORA, fits
from memdlm_dist.performance.gpu_check.section import Context, Failure, Skip, read_json

# Weights are float32, as in full training.
_DENSE_1B = ("train_configs/bench_8b.toml", "--model.flavor", "1B", "--training.dtype", "float32")
# name -> (seq_len, files of the built-in corpus), with debug sizes and with full sizes
_DATA = {
    "data": (("128", "40"), ("4096", "400")),
    "packed": (("128", "40"), ("4096", "400")),
    "packed_128k": (("256", "40"), ("131072", "1600")),
}


def _rows(context: Context, name: str) -> tuple[str, str]:
    """Return seq_len and the number of files of a data set."""
    return _DATA[name][0 if context.debug else 1]


def _data(context: Context, name: str) -> Path:
    """Prepare shards of the built-in corpus if missing and return their folder; all data sets but "data" are packed."""
    length, files = _rows(context, name)
    folder = context.scratch / name
    if not (folder / "summary.json").exists():
        if name == "data":
            tokens = ["--train-tokenizer", "500" if context.debug else "2048"]
        else:
            tokens = ["--tokenizer", str(_data(context, "data") / "tokenizer"), "--pack-documents"]
        context.python(
            "tools/prepare_data.py", "--builtin", "--limit", files, *tokens, "--seq-len", length,
            "--output", str(folder), "--overwrite",
        )  # fmt: skip
    return folder


def _training(context: Context, name: str, data: Path) -> list[str]:
    """Return the arguments of a short run: configuration file and keys."""
    debug = ("train_configs/debug.toml", "--activation_checkpoint.mode", "full")
    return [
        *(debug if context.debug else _DENSE_1B), "--job.dump_folder", str(context.scratch / name),
        "--data.train", str(data / "train"),
        "--model.hf_assets_path", str(data / "tokenizer"), "--lr_scheduler.warmup_steps", "2",
        "--metrics.log_freq", "1", "--metrics.enable_tensorboard", "--metrics.disable_color_printing",
    ]  # fmt: skip


def _train(context: Context, name: str, arguments: Sequence[str], first: int, last: int) -> None:
    """Train with launch/train.sh and keep losses, throughput and memory from the TensorBoard files.

    Raises:
        Failure: if a step from `first` to `last` is not logged, or its loss is not finite.
    """
    context.run("bash", "launch/train.sh", *arguments, "--training.steps", str(last))
    scalars = _scalars(context.scratch / name / "tb")
    losses = scalars.get("loss_metrics/global_avg_loss", {})
    if sorted(losses) != list(range(first, last + 1)):
        raise Failure(f"steps {first} to {last} must be logged, but the logged steps are {sorted(losses)}")
    if not all(map(math.isfinite, losses.values())):
        raise Failure(f"losses are not finite: {losses}")
    speed, memory = scalars["throughput(tps)"], scalars["memory/max_reserved(GiB)"]
    context.numbers.setdefault("runs", []).append(
        {
            "name": f"{name}, steps {first} to {last}",
            "first_loss": losses[first],
            "last_loss": losses[last],
            "tokens_per_second": speed[last],
            "memory_gib": max(memory.values()),
        }
    )


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the scalars of a run's latest start: name -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # a slow import

    # Each start writes one file; two starts within a minute share a folder.
    starts = sorted(folder.rglob("events.*"), key=lambda path: path.stat().st_mtime)
    if not starts:
        raise Failure(f"there is no TensorBoard file in {folder}")
    events = EventAccumulator(str(starts[-1]))
    events.Reload()
    return {name: {x.step: x.value for x in events.Scalars(name)} for name in events.Tags()["scalars"]}


def _fresh(context: Context, name: str, *arguments: str, disk_gib: float = 0.0) -> None:
    """Remove the run of an earlier check; skip the section if device memory or disk space is too small.

    Args:
        arguments: configuration keys that the run adds to those of the 1B flavour.
        disk_gib: disk space that the checkpoints need, in GiB.

    Raises:
        Skip: if the run does not fit.
    """
    if not context.debug and not fits(context, *_DENSE_1B, *arguments):
        raise Skip(f"does not fit on the devices, {BY_ESTIMATE}")
    folder = context.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    context.scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(context.scratch).free / 2**30
    if not context.debug and free < disk_gib:
        raise Skip(f"checkpoints need {disk_gib:.0f} GiB below {context.scratch}, and {free:.0f} are free")


def _dense(context: Context) -> list[str]:
    """Return the arguments of section run_dense, whose checkpoint section decode loads."""
    return [*_training(context, "run_dense", context.scratch / "data"), "--checkpoint.enable"]


def run_dense(context: Context) -> None:
    """Train and save a run, resume it, and save the weights alone."""
    _fresh(context, "run_dense", disk_gib=40)
    _data(context, "data")
    first, last = (2, 3) if context.debug else (5, 8)
    arguments = [*_dense(context), "--checkpoint.interval", str(first)]
    _train(context, "run_dense", arguments, 1, first)
    # Resuming tests the optimizer state, so the final save holds the weights alone.
    _train(context, "run_dense", [*arguments, "--checkpoint.last_save_model_only"], first + 1, last)


def run_experts(context: Context) -> None:
    """Train adapters of the mixture-of-experts backbone."""
    # The frozen base is in bfloat16, so the model fits on one device of 40 GB.
    experts = [*(EXPERTS_DEBUG if context.debug else EXPERTS), *LORA]
    _fresh(context, "run_experts", *experts)
    arguments = [*_training(context, "run_experts", _data(context, "data")), *experts]
    _train(context, "run_experts", arguments, 1, 2 if context.debug else 5)


def run_packed(context: Context) -> None:
    """Train on packed rows."""
    _fresh(context, "run_packed")
    arguments = _training(context, "run_packed", _data(context, "packed"))
    _train(context, "run_packed", arguments, 1, 2 if context.debug else 5)


def run_128k(context: Context) -> None:
    """Train on packed rows of 131,072 tokens."""
    longer = ["--training.local_batch_size", "1", "--training.seq_len", _rows(context, "packed_128k")[0]]
    if not context.debug:
        longer += ["--model.rope_scaling", "32"]
    _fresh(context, "run_128k", *longer)
    arguments = [*_training(context, "run_128k", _data(context, "packed_128k")), *longer]
    _train(context, "run_128k", arguments, 1, 2 if context.debug else 3)


def runs_headline(numbers: dict[str, Any]) -> str:
    """Return first and last loss and throughput, as one line."""
    if not numbers.get("runs"):
        return ""
    first, last = numbers["runs"][0], numbers["runs"][-1]
    return f"loss {first['first_loss']:.3f} to {last['last_loss']:.3f}, {first['tokens_per_second']:,.0f} tokens/s/GPU"


def measure_decoding(context: Context) -> None:
    """Measure decoding with the checkpoint of `run_dense`: caches, threshold and memory, with tools/bench.py decode."""
    if not (context.scratch / "run_dense/checkpoint").is_dir():
        raise Skip("section run_dense has no checkpoint here; run both with --only run_dense decode")
    path = context.log.with_suffix(".bench.json")
    path.unlink(missing_ok=True)
    prompt, new = ("24", "8") if context.debug else ("1024", "64" if context.quick else "128")
    rounds = "1" if context.debug or context.quick else "3"
    context.python(
        "tools/bench.py", "decode", *_dense(context), "--data.validation", str(context.scratch / "data/train"),
        "--prompt-tokens", prompt, "--new-tokens", new, "--rounds", rounds, "--json", str(path),
    )  # fmt: skip
    context.numbers.update(read_json(path))


def decoding_headline(numbers: dict[str, Any]) -> str:
    """Return the plain loop's speed and the fastest setting, memory off, as one line."""
    rows = [row for row in numbers.get("settings", []) if row["memory"] == "off"]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["over_plain"])
    threshold = f", threshold {best['threshold']:g}" if best["threshold"] is not None else ""
    return (
        f"plain {rows[0]['tokens_per_second']:,.1f} tokens/s; cache {best['cache']}{threshold}: "
        f"{best['over_plain']:.2f} times plain"
    )
