"""Helpers that start training runs and read their TensorBoard scalars."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
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
    """Return the arguments of a reproducible debug run with the output folder `out`."""
    return [
        "--job.config_file", "train_configs/debug.toml", "--job.dump_folder", str(out), "--debug.seed", "7",
        "--metrics.disable_color_printing", *args,
    ]  # fmt: skip


def launch(processes: int, out: Path, *args: str) -> str:
    """Train with launch/train.sh, as a user does; return the output."""
    config, *rest = debug(out, *args)[1:]
    return _run(["bash", "launch/train.sh", config, *rest], NGPU=str(processes))


def run_many(runs: Iterable[tuple[int, list[str]] | tuple[int, list[str], dict[str, Any]]]) -> list[str]:
    """Train several runs one after the other, in forked ranks.

    Args:
        runs: (processes, arguments) or (processes, arguments, options) of each run. Options are "status", the expected
            exit status (0 by default), "environment", environment variables of the run, and the options of
            tests/workers/run_many.py.

    Returns:
        The output of each run.
    """
    outputs = []
    for processes, arguments, *rest in runs:
        options = dict(rest[0]) if rest else {}
        expected, environment = options.pop("status", 0), options.pop("environment", {})
        call = "tests.workers.run_many:train_rank", arguments, options
        status, output = zygote.run(processes, *call, environment=environment)
        assert status == expected, f"status {status} of {processes} x {arguments}\n{output[-10000:]}"
        outputs.append(output)
    return outputs


def run_module(module: str, *arguments: str, **env: str) -> str:
    """Run `python -m module` as a user does; return the output."""
    return _run([sys.executable, "-m", module, *arguments], **env)


class Launched:
    """Running launch script in a new session; its output goes to a file."""

    def __init__(self, log: Path, script: str, *arguments: str, **variables: str):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        with log.open("a") as file:
            self.process = subprocess.Popen(
                ["bash", script, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str) -> None:
        """Wait until the output matches a regular expression."""
        deadline = time.monotonic() + TIMEOUT
        while not re.search(pattern, self.text()):
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()[-5000:]
            time.sleep(0.1)

    def status(self) -> int:
        return self.process.wait(TIMEOUT)

    def signal_all(self, number: int) -> None:
        """Send a signal to every process of the job, as a batch system does."""
        for process in (self.process.pid, *_descendants(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """Kill torchrun's agent and all ranks at once, as when a node goes down."""
        for child in [*_descendants(self.process.pid), self.process.pid]:
            os.kill(child, signal.SIGKILL)
        self.process.wait()


def _descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [descendant for child in map(int, children) for descendant in (*_descendants(child), child)]


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """Return the TensorBoard scalars of a run: name -> step -> value."""
    files = tuple(sorted((file, file.stat().st_size) for file in (out / "tb").rglob("*") if file.is_file()))
    return {name: dict(values) for name, values in _scalars(out, files).items()}


@functools.cache
def _scalars(out: Path, files: tuple[tuple[Path, int], ...]) -> dict[str, dict[int, float]]:
    del files  # part of the cache key: a folder with new events is read again
    by_name: dict[str, dict[int, float]] = {}
    for folder in sorted((out / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in events.Tags()["scalars"]:
            by_name.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return by_name
