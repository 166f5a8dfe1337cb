"""Start training runs from tests, and read their TensorBoard scalars."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import zygote
from tests.support.zygote import ROOT, TIMEOUT


def _run(command: list[str], **env: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout


def debug(out: Path, *args: str) -> list[str]:
    """Return the arguments of a reproducible debug run into `out`."""
    return [
        "--job.config_file", "train_configs/debug.toml", "--job.dump_folder", str(out), "--debug.seed", "7",
        "--metrics.disable_color_printing", *args,
    ]  # fmt: skip


def launch(processes: int, out: Path, *args: str) -> str:
    """Train through launch/train.sh, as a user does; returns what it prints."""
    config, *rest = debug(out, *args)[1:]
    return _run(["bash", "launch/train.sh", config, *rest], NGPU=str(processes))


def run_many(runs: Iterable[tuple[int, list[str]] | tuple[int, list[str], dict[str, Any]]]) -> list[str]:
    """Train (processes, arguments[, options]) one after the other, in forked ranks; returns what each prints.

    Options: "status", the expected exit status, 0 by default; "environment", variables of the run; and those of
    tests/workers/run_many.py.
    """
    outputs = []
    for processes, arguments, *rest in runs:
        options = dict(rest[0]) if rest else {}
        expected, environment = options.pop("status", 0), options.pop("environment", {})
        run = "tests.workers.run_many:train_rank", arguments, options
        status, output = zygote.run(processes, *run, environment=environment)
        assert status == expected, f"status {status} of {processes} x {arguments}\n{output[-10000:]}"
        outputs.append(output)
    return outputs


def run_module(module: str, *arguments: str) -> str:
    """Run `python -m module` as a user does; returns what it prints."""
    return _run([sys.executable, "-m", module, *arguments])


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a run: name -> step -> value."""
    files = tuple(sorted((file, file.stat().st_size) for file in (out / "tb").rglob("*") if file.is_file()))
    return {name: dict(values) for name, values in _scalars(out, files).items()}


@functools.cache
def _scalars(out: Path, files: tuple[tuple[Path, int], ...]) -> dict[str, dict[int, float]]:
    del files  # a folder that has grown is read again
    found: dict[str, dict[int, float]] = {}
    for folder in sorted((out / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found
