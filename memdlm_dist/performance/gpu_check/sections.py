"""The sections: what each is for, the commands that it runs and the numbers that it keeps of their results.

Sections run tools and launch scripts as a user does. With debug sizes the same commands run on a CPU within seconds.
"""

import importlib.util
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from memdlm_dist.performance.gpu_check import processes
from memdlm_dist.performance.gpu_check.figures import figures


class Failure(Exception):
    """A command of a section failed, or its result makes no sense."""


class OutOfMemory(Failure):
    """A command needed more memory than the device has."""


class Skip(Exception):
    """A section cannot run here."""


@dataclass
class Context:
    """What a running section works with: the machine, its folders, its time, and the numbers that it has so far."""

    root: Path  # of the repository
    output: Path  # of the check
    log: Path
    environment: dict[str, Any]  # from environment.py
    debug: bool
    quick: bool
    deadline: float  # by time.monotonic()
    numbers: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def devices(self) -> int:
        """Number of processes that a command starts: one for each device, and one without any."""
        return len(self.environment["devices"]) or 1

    @property
    def remaining(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def scratch(self) -> Path:
        """Folder of what sections prepare for each other; debug sizes have their own."""
        return self.output / ("debug" if self.debug else "runs")

    def status(self, *command: str, stdin: str = "") -> tuple[int, str]:
        """Run a command from the repository's root; returns its exit status and its output.

        Raises:
            processes.TimeLimit: at the section's deadline.
        """
        said = shlex.join(command).replace(sys.executable, "python").replace(f"{self.root}/", "")
        self.commands.append(f"NGPU={self.devices} {said}" if command[0] == "bash" else said)
        # launch/train.sh takes the interpreter of an activated environment: this one, not .venv's.
        environment = {"VIRTUAL_ENV": sys.prefix, "NGPU": str(self.devices)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
        return processes.run(command, self.log, max(0.0, self.remaining), self.root, environment, stdin)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command; returns its output.

        Raises:
            Failure: if its exit status is not 0.
            processes.TimeLimit: at the section's deadline.
        """
        status, output = self.status(*command, stdin=stdin)
        if status != 0:
            kind = OutOfMemory if "OutOfMemoryError" in output or "out of memory" in output else Failure
            raise kind(f"{_name(command)} ended with status {status}: {_last_words(output)}")
        return output

    def python(self, tool: str, *arguments: str, stdin: str = "") -> str:
        """Run a Python file or module (`-m`) with this interpreter; see `run`."""
        return self.run(sys.executable, tool, *arguments, stdin=stdin)


@dataclass(frozen=True)
class Section:
    """One part of the check."""

    name: str
    purpose: str
    run: Callable[[Context], None]  # fills Context.numbers; raises Failure or Skip
    headline: Callable[[dict[str, Any]], str]  # the key figure of its numbers
    needs_device: bool = False
    least: float = 60.0  # seconds below which it is not worth starting


def _name(command: Sequence[str]) -> str:
    return next((Path(word).name for word in command[1:] if not word.startswith("-")), command[0])


def _last_words(output: str) -> str:
    """Return the line of an output that most likely says why a command failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for sign in ("error: ", "Error: ", "Error"):
        told = [line for line in lines if sign in line]
        if told:
            return told[-1][-300:]
    return lines[-1][-300:] if lines else "no output"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{path.name} holds no result ({error})") from None


def _environment(context: Context) -> None:
    context.numbers.update(context.environment)


def _of_environment(numbers: dict[str, Any]) -> str:
    if not numbers:
        return ""
    return f"torch {numbers['packages']['torch']}, {len(numbers['devices'])} devices, {numbers['cpus']} CPUs"


# Benches


@dataclass(frozen=True)
class _Model:
    """A model that is measured: its configuration, its depth, and the depths to extrapolate from if it does not fit."""

    arguments: tuple[str, ...]
    layers: int
    # The share of layers with fast weights is the whole model's in each of them, as extrapolating needs.
    less: tuple[tuple[int, ...], ...]
    debug: tuple[str, ...]


_EXPERTS = ("--model.name", "llada_moe", "--model.flavor", "7B-A1B", "--compile.no_enable")
_LORA = ("--model.converters", "lora")
_DENSE_8B = _Model((), 32, ((24, 16), (16, 8), (8,)), ())
_MOE_7B = _Model(_EXPERTS, 16, ((8,),), ("--model.name", "llada_moe"))
_DEBUG_LAYERS = 4


_BY_ESTIMATE = "by the estimate of tools/dry_run.py"


def _fits(context: Context, config: str, *arguments: str) -> bool:
    """Return whether a configuration fits on the devices, by the estimate of tools/dry_run.py; on a CPU all does."""
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
    except (OSError, ValueError, LookupError, TypeError):  # it estimated nothing, which ends with status 1 as well
        raise Failure(f"dry_run.py ended with status {status}: {_last_words(output)}") from None
    return status == 0


def _bench(context: Context, config: str, arguments: Iterable[str], rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Run tools/bench.py; returns its result."""
    path = context.log.with_suffix(".bench.json")
    path.unlink(missing_ok=True)
    context.python(
        "tools/bench.py", config, "--processes", str(context.devices), "--rounds", str(rounds), "--warm-up",
        str(warm_up), "--json", str(path), *arguments,
    )  # fmt: skip
    found: dict[str, Any] = _read_json(path)
    return found


def _bench_model(model: _Model, lora: bool, kernels: bool = False) -> Callable[[Context], None]:
    """Return a section that measures a model, whole if it fits."""

    def run(context: Context) -> None:
        config = "train_configs/debug.toml" if context.debug else "train_configs/bench_8b.toml"
        arguments = [*(model.debug if context.debug else model.arguments), *(_LORA if lora else ())]
        whole = _DEBUG_LAYERS if context.debug else model.layers
        rounds, warm_up = (1, 1) if context.debug else (3, 2) if context.quick else (5, 2)
        table = context.log.with_suffix(".kernels.txt")
        table.unlink(missing_ok=True)
        for depths in ((whole,), *(() if context.debug else model.less)):
            if not _fits(context, config, "--layers", str(depths[0]), *arguments):
                continue
            context.numbers.update(whole_layers=whole, benches=[])
            try:
                for layers in depths:
                    profile = ["--profile", str(table)] if kernels and layers == depths[0] else []
                    wanted = [*profile, "--layers", str(layers), *arguments]
                    found = _bench(context, config, wanted, rounds, warm_up)
                    context.numbers["benches"].append(found)
                    if profile:
                        context.numbers["kernels"] = [line.rstrip() for line in table.read_text().splitlines()[:18]]
            except OutOfMemory as error:  # the estimate was too low
                context.numbers["out_of_memory"] = str(error)
                continue
            return
        if "out_of_memory" in context.numbers:
            raise Failure(context.numbers["out_of_memory"])
        raise Skip(f"not even the smallest depth fits on the devices, {_BY_ESTIMATE}")

    return run


def _of_bench(numbers: dict[str, Any]) -> str:
    found = figures(numbers)
    if found is None:
        return ""
    return (
        f"{found.depth}: plain {found.tokens_per_second['plain']:,.0f} tokens/s/GPU, "
        f"ours {found.over_plain['ours']:.3f} times plain"
    )


def _lengths(context: Context) -> None:
    """Measure rows of several lengths, in processes of few lengths each: what does not fit ends the last alone."""
    groups: list[tuple[int, ...]]
    if context.debug:
        config, arguments, groups = "train_configs/debug.toml", ["--layers", "2"], [(64, 128)]
    else:
        config, arguments = "train_configs/bench_8b.toml", ["--layers", "8"]
        groups = [(4096, 8192, 16384), (32768,), (65536,), (131072,)]
        if context.quick:
            groups = [(4096, 16384), (65536,)]
    arguments += ["--training.local_batch_size", "1"]
    every = [length for lengths in groups for length in lengths]
    fitting = every
    while fitting and not _fits(context, config, *arguments, "--training.seq_len", str(fitting[-1])):
        fitting = fitting[:-1]
    if not fitting:
        raise Skip(f"not even rows of {every[0]:,} tokens fit on a device, {_BY_ESTIMATE}")
    if fitting != every:
        context.numbers["stopped"] = f"rows of {every[len(fitting)]:,} tokens do not fit, {_BY_ESTIMATE}"
        groups = [kept for lengths in groups if (kept := tuple(x for x in lengths if x in fitting))]
    rows = context.numbers["lengths"] = []
    for lengths in groups:
        wanted = ["--lengths", *map(str, lengths), *arguments]
        began = time.monotonic()
        try:
            found = _bench(context, config, wanted, rounds=1 if context.debug else 2, warm_up=1)
        except OutOfMemory:
            if not rows:
                raise
            context.numbers["stopped"] = f"rows of {lengths[0]:,} tokens do not fit"
            return
        rows += found["lengths"]
        # Attention's share makes the next length take up to four times as long, start and compilation apart.
        if lengths != groups[-1] and context.remaining < 2 * (time.monotonic() - began):
            context.numbers["stopped"] = f"no time was left for rows longer than {lengths[-1]:,} tokens"
            return


def _of_lengths(numbers: dict[str, Any]) -> str:
    if not numbers.get("lengths"):
        return ""
    last = numbers["lengths"][-1]
    return f"{last['length']:,} tokens: ours {last['ratio']['ours_over_plain']:.3f} times plain"


# Tests


def _tests(context: Context) -> None:
    if not all(map(importlib.util.find_spec, ("pytest", "xdist"))):
        raise Skip("needs the dev extra: bash launch/setup.sh dev")
    path = context.log.with_suffix(".junit.xml")
    path.unlink(missing_ok=True)
    try:
        status, output = context.status(
            sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "tests/gpu", f"--junitxml={path}"
        )  # fmt: skip
    finally:
        if path.exists():  # pytest writes it when it is interrupted, too
            context.numbers.update(_of_junit(path))
    if "tests" not in context.numbers:
        raise Failure(f"pytest ended with status {status}: {_last_words(output)}")
    if status != 0:
        raise Failure(f"{len(context.numbers['failures'])} of {context.numbers['tests']} tests failed")


def _of_junit(path: Path) -> dict[str, Any]:
    """Return what pytest's XML says: number of tests, of skipped ones, and the names of those that failed."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError:
        return {}
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "tests": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def _of_tests(numbers: dict[str, Any]) -> str:
    if "tests" not in numbers:
        return ""
    return f"{numbers['tests']} tests, {len(numbers['failures'])} failed, {numbers['skipped']} skipped"


# Runs


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
    if not context.debug and not _fits(context, *_DENSE_1B, *arguments):
        raise Skip(f"does not fit on the devices, {_BY_ESTIMATE}")
    folder = context.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    context.scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(context.scratch).free / 2**30
    if not context.debug and free < disk_gib:
        raise Skip(f"checkpoints need {disk_gib:.0f} GiB below {context.scratch}, and {free:.0f} are free")


def _dense(context: Context) -> list[str]:
    """Return the configuration of the run whose checkpoint is resumed and decoded with."""
    return [*_training(context, "run_dense", context.scratch / "data"), "--checkpoint.enable"]


def _run_dense(context: Context) -> None:
    _fresh(context, "run_dense", disk_gib=40)
    _data(context, "data")
    first, last = (2, 3) if context.debug else (5, 8)
    arguments = [*_dense(context), "--checkpoint.interval", str(first)]
    _train(context, "run_dense", arguments, 1, first)
    # Weights alone at the end: the optimizer's state was saved and loaded once.
    _train(context, "run_dense", [*arguments, "--checkpoint.last_save_model_only"], first + 1, last)


def _run_experts(context: Context) -> None:
    # The base is frozen, in bfloat16: the whole model fits on one device of 40 GB.
    experts = [*(_MOE_7B.debug if context.debug else _EXPERTS), *_LORA]
    _fresh(context, "run_experts", *experts)
    arguments = [*_training(context, "run_experts", _data(context, "data")), *experts]
    _train(context, "run_experts", arguments, 1, 2 if context.debug else 5)


def _run_packed(context: Context) -> None:
    _fresh(context, "run_packed")
    arguments = _training(context, "run_packed", _data(context, "packed"))
    _train(context, "run_packed", arguments, 1, 2 if context.debug else 5)


def _run_128k(context: Context) -> None:
    longer = ["--training.local_batch_size", "1", "--training.seq_len", _rows(context, "packed_128k")[0]]
    if not context.debug:
        longer += ["--model.rope_scaling", "32"]
    _fresh(context, "run_128k", *longer)
    arguments = [*_training(context, "run_128k", _data(context, "packed_128k")), *longer]
    _train(context, "run_128k", arguments, 1, 2 if context.debug else 3)


def _of_runs(numbers: dict[str, Any]) -> str:
    if not numbers.get("runs"):
        return ""
    first, last = numbers["runs"][0], numbers["runs"][-1]
    return f"loss {first['first_loss']:.3f} to {last['last_loss']:.3f}, {first['tokens_per_second']:,.0f} tokens/s/GPU"


# Decoding


def _decoding(context: Context) -> None:
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
            raise Failure(f"generate.py answered {len(answers)} of 3 prompts: {_last_words(output)}")
        seconds = statistics.median(answer["decoding_seconds"] for answer in timed)
        context.numbers[f"memory_{memory}"] = {
            "new_tokens": new_tokens,
            "tokens_per_second": new_tokens / seconds,
            "seconds_per_step": statistics.median(answer["decoding_seconds"] / answer["steps"] for answer in timed),
            "memory_seconds": statistics.median(answer["memory_seconds"] for answer in timed),
        }


def _of_decoding(numbers: dict[str, Any]) -> str:
    said = (f"memory {x}: {numbers[f'memory_{x}']['tokens_per_second']:,.1f} tokens/s" for x in ("off", "on")
            if f"memory_{x}" in numbers)  # fmt: skip
    return ", ".join(said)


# The most valuable first.
SECTIONS = (
    Section("environment", "devices, versions, and what the code will use of them", _environment, _of_environment,
            least=0),
    Section("bench_8b", "full training at LLaDA-8B's sizes, compiled: plain, straightforward, ours; kernels of a step",
            _bench_model(_DENSE_8B, lora=False, kernels=True), _of_bench),
    Section("lora_8b", "the same for LoRA on a frozen base", _bench_model(_DENSE_8B, lora=True), _of_bench),
    Section("tests", "pytest -m gpu", _tests, _of_tests, needs_device=True),
    Section("bench_moe", "full training at LLaDA-MoE-7B-A1B's sizes", _bench_model(_MOE_7B, lora=False), _of_bench),
    Section("lora_moe", "the same for LoRA on a frozen base", _bench_model(_MOE_7B, lora=True), _of_bench),
    Section("run_dense", "a run of the 1B flavour, compiled, full checkpointing; saved and resumed", _run_dense,
            _of_runs),
    Section("run_experts", "a run of LLaDA-MoE-7B-A1B with LoRA", _run_experts, _of_runs),
    Section("run_packed", "a run of the 1B flavour on packed rows, compiled", _run_packed, _of_runs),
    Section("run_128k", "the same on packed rows of 131,072 tokens, where memory allows", _run_128k, _of_runs),
    Section("lengths", "plain and ours on rows of 4,096 to 131,072 tokens, as far as memory and time go", _lengths,
            _of_lengths),
    Section("decoding", "tools/generate.py on run_dense's checkpoint, memory off and on", _decoding, _of_decoding),
)  # fmt: skip
# Those of --quick, which are to take about ten minutes on an H100.
QUICK = ("environment", "bench_8b", "lora_8b", "run_dense", "decoding")
