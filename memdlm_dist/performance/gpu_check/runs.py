"""Short runs of each production path by launch/train.sh, and decoding with the checkpoint of one of them."""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.performance.gpu_check.benches import BY_ESTIMATE, EXPERTS, EXPERTS_DEBUG, LORA, fits
from memdlm_dist.performance.gpu_check.section import Context, Failure, Skip, last_words

# Weights in float32, as a full training of one's own has them.
_DENSE_1B = ("train_configs/bench_8b.toml", "--model.flavor", "1B", "--training.dtype", "float32")
# name -> (tokens of a row, files of the built-in corpus), with debug sizes and in earnest
_DATA = {
    "data": (("128", "40"), ("4096", "400")),
    "packed": (("128", "40"), ("4096", "400")),
    "packed_128k": (("256", "40"), ("131072", "1600")),
}


def _rows(context: Context, name: str) -> tuple[str, str]:
    return _DATA[name][0 if context.debug else 1]


def _data(context: Context, name: str) -> Path:
    """Prepare shards of the built-in corpus, unless they are there; packed, but for "data"."""
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
    """Return the configuration of a short run and its keys."""
    debug = ("train_configs/debug.toml", "--activation_checkpoint.mode", "full")
    return [
        *(debug if context.debug else _DENSE_1B), "--job.dump_folder", str(context.scratch / name),
        "--data.train", str(data / "train"),
        "--model.hf_assets_path", str(data / "tokenizer"), "--lr_scheduler.warmup_steps", "2",
        "--metrics.log_freq", "1", "--metrics.enable_tensorboard", "--metrics.disable_color_printing",
    ]  # fmt: skip


def _train(context: Context, name: str, arguments: Sequence[str], first: int, last: int) -> None:
    """Train through launch/train.sh; keeps the losses and the throughput that TensorBoard got.

    Raises:
        Failure: unless every step from `first` to `last` was logged with a finite loss.
    """
    context.run("bash", "launch/train.sh", *arguments, "--training.steps", str(last))
    scalars = _scalars(context.scratch / name / "tb")
    losses = scalars.get("loss_metrics/global_avg_loss", {})
    if sorted(losses) != list(range(first, last + 1)):
        raise Failure(f"steps {first} to {last} were to be logged, but were {sorted(losses)}")
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
    """Return the scalars of the latest start of a run: name -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # imports slowly

    # A file each; two starts within a minute share a folder.
    starts = sorted(folder.rglob("events.*"), key=lambda path: path.stat().st_mtime)
    if not starts:
        raise Failure(f"TensorBoard got nothing in {folder}")
    events = EventAccumulator(str(starts[-1]))
    events.Reload()
    return {name: {x.step: x.value for x in events.Scalars(name)} for name in events.Tags()["scalars"]}


def _fresh(context: Context, name: str, *arguments: str, disk_gib: float = 0.0) -> None:
    """Remove an earlier check's run, and see that there is room for this one and its checkpoints.

    Args:
        arguments: keys of the configuration beside those of the 1B flavour.
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
    """Return the configuration of the run whose checkpoint is resumed and decoded with."""
    return [*_training(context, "run_dense", context.scratch / "data"), "--checkpoint.enable"]


def run_dense(context: Context) -> None:
    """Train, save, resume and save the weights alone."""
    _fresh(context, "run_dense", disk_gib=40)
    _data(context, "data")
    first, last = (2, 3) if context.debug else (5, 8)
    arguments = [*_dense(context), "--checkpoint.interval", str(first)]
    _train(context, "run_dense", arguments, 1, first)
    # Weights alone at the end: the optimizer's state was saved and loaded once.
    _train(context, "run_dense", [*arguments, "--checkpoint.last_save_model_only"], first + 1, last)


def run_experts(context: Context) -> None:
    """Train adapters of a mixture of experts."""
    # The base is frozen, in bfloat16: the whole model fits on one device of 40 GB.
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
    """Return the first and last loss, and the throughput."""
    if not numbers.get("runs"):
        return ""
    first, last = numbers["runs"][0], numbers["runs"][-1]
    return f"loss {first['first_loss']:.3f} to {last['last_loss']:.3f}, {first['tokens_per_second']:,.0f} tokens/s/GPU"


def measure_decoding(context: Context) -> None:
    """Respond to prompts with the checkpoint of `run_dense`, without and with memory."""
    if not (context.scratch / "run_dense/checkpoint").is_dir():
        raise Skip("there is no checkpoint of section run_dense: run both with --only run_dense decoding")
    new_tokens = 8 if context.debug else 64 if context.quick else 128
    prompts = "import os\ndef read(self, size):\nclass Reader(object):\n"
    for memory in ("off", "on"):
        output = context.python(
            "tools/generate.py", *_dense(context), "--interactive", "--json", "--memory", memory, "--no-eos-stop",
            "--new-tokens", str(new_tokens), stdin=prompts,
        )  # fmt: skip
        answers = [json.loads(line) for line in output.splitlines() if line.startswith('{"prompt"')]
        timed = answers[1:]  # the first one is the warm-up
        if len(timed) != 2:
            raise Failure(f"generate.py answered {len(answers)} of 3 prompts: {last_words(output)}")
        seconds = statistics.median(answer["decoding_seconds"] for answer in timed)
        context.numbers[f"memory_{memory}"] = {
            "new_tokens": new_tokens,
            "tokens_per_second": new_tokens / seconds,
            "seconds_per_step": statistics.median(answer["decoding_seconds"] / answer["steps"] for answer in timed),
            "memory_seconds": statistics.median(answer["memory_seconds"] for answer in timed),
        }


def decoding_headline(numbers: dict[str, Any]) -> str:
    """Return the tokens a second."""
    said = (f"memory {x}: {numbers[f'memory_{x}']['tokens_per_second']:,.1f} tokens/s" for x in ("off", "on")
            if f"memory_{x}" in numbers)  # fmt: skip
    return ", ".join(said)
