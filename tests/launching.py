"""Starting training processes from tests, and reading what they leave behind."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
TIMEOUT = 500


def _run(command, **env) -> str:
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
    """Arguments of a reproducible debug run into `out`."""
    return [
        "--job.config_file", "train_configs/debug.toml", "--job.dump_folder", str(out), "--debug.seed", "7",
        "--metrics.disable_color_printing", *args,
    ]  # fmt: skip


def launch(processes: int, out: Path, *args: str) -> str:
    """One run through launch/train.sh, as a user starts it; returns what it prints."""
    config, *rest = debug(out, *args)[1:]
    return _run(["bash", "launch/train.sh", config, *rest], NGPU=str(processes))


def run_many(runs: Sequence[tuple[int, list[str]] | tuple[int, list[str], dict[str, Any]]]) -> list[str]:
    """Several runs of (processes, arguments[, options]), one after the other; returns what each prints.

    See run_many.py for the options.
    """
    entries = [{"processes": n, "arguments": arguments, **(rest[0] if rest else {})} for n, arguments, *rest in runs]
    out = _run([sys.executable, "tests/run_many.py", json.dumps(entries)])
    return re.split(r"^status .*\n", out, flags=re.MULTILINE)[:-1]


def run_script(*command: str) -> str:
    """A script of tests/ that starts its own ranks."""
    return _run([sys.executable, *command])


def from_one_seed(root: Path, *args: str) -> tuple[tuple[int, list[str]], list[str]]:
    """The run that writes a seed checkpoint under `root`, and the arguments of one that starts from it."""
    enable = "--checkpoint.enable"
    seed = (1, debug(root / "seed", *args, enable, "--checkpoint.create_seed_checkpoint"))
    load = ["--checkpoint.load_only", "--checkpoint.initial_load_path", str(root / "seed/checkpoint/step-0")]
    return seed, [*args, enable, *load]


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars of a run: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for folder in sorted((out / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found
