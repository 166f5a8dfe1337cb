"""Runs of a study: training and evaluations as processes, several at a time, each exactly once.

Every run has a folder ARM-SEED with the output of its training, one folder for each evaluation, and `done.json`: the
commands that have succeeded. A second call starts only what is missing; an interrupted training starts again, since a
continued one would have no time of its own, and might lack its last validation. Every process is one rank.
"""

import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memdlm_dist.config import parse_config
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError, require
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.study.arms import TRAINING, Overrides, Study, merge
from memdlm_dist.runtime.single_process import without_ranks

DONE, LOG = "done.json", "study.log"
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-{self.seed}"


def _overrides(study: Study, run: Run, folder: Path) -> dict[str, str | None]:
    """Return the overrides of a run's training."""
    overrides = study.arms[run.arm].overrides
    seeded = {key: value and value.replace("{seed}", str(run.seed)) for key, value in overrides.items()}
    return merge(seeded, {"job.dump_folder": str(folder)})


def commands(study: Study, run: Run, folder: Path, evaluations: Sequence[str]) -> dict[str, list[str]]:
    """Return the commands of a run by name, in their order: the training, then the evaluations.

    Args:
        study: the study.
        run: the run.
        folder: the run's output folder.
        evaluations: names of evaluations.
    """
    own = _overrides(study, run, folder)
    result = {TRAINING: [sys.executable, "-m", "memdlm_dist.train", "--job.config_file", study.config, *_flags(own)]}
    for name in evaluations:
        evaluation = study.evaluations[name]
        tool, *command = evaluation.tool
        result[name] = [
            *(sys.executable, f"tools/{tool}", *command, study.config, *evaluation.arguments),
            *("--checkpoint", str(folder / "checkpoint"), "--output", str(folder / name), "--overwrite"),
            *_flags(merge(own, evaluation.overrides)),
        ]
    return result


def settings(study: Study, run: Run, evaluations: Sequence[str]) -> dict[str, str]:
    """Return what identifies the commands of a run by name: their words without interpreter and folder."""
    named = commands(study, run, Path("RUN"), evaluations)
    return {name: shlex.join(command[1:]) for name, command in named.items()}


def check(study: Study, runs: Sequence[Run], evaluations: Sequence[str]) -> None:
    """Check the configurations of runs, before hours of training.

    Raises:
        UserError: if an arm's flags are wrong, or leave no held-out losses or no checkpoint to evaluate.
    """
    for run in {run.arm: run for run in runs}.values():
        config = _parse(study, f"The arm {run.arm}", _overrides(study, run, Path("RUN")))
        require(
            config.validation.enable and bool(config.data.validation),
            f"The arm {run.arm} measures no held-out loss; set validation.enable and data.validation.",
        )
        require(
            config.checkpoint.enable or not evaluations,
            f"The arm {run.arm} saves no checkpoint to evaluate; set checkpoint.enable, or leave out --evaluations.",
        )
    for name in evaluations:
        if change := study.evaluations[name].overrides:
            _parse(study, f"The evaluation {name}", merge(_overrides(study, runs[0], Path("RUN")), change))


def _parse(study: Study, what: str, overrides: Overrides) -> JobConfig:
    """Parse a configuration; `what` begins the message of an error."""
    try:
        return parse_config.parse(["--job.config_file", study.config, *_flags(overrides)])
    except UserError as error:
        raise UserError(f"{what} cannot run: {error}") from None


def done(folder: Path) -> dict[str, Any]:
    """Return what has succeeded in a run's folder: name -> {"setting", "seconds"}."""
    result: dict[str, Any] = report.read_json(folder / DONE) if (folder / DONE).exists() else {}
    return result


def missing(study: Study, runs: Sequence[Run], output: Path, evaluations: Sequence[str]) -> dict[Run, list[str]]:
    """Return what is left to do for every run that is not complete.

    Raises:
        UserError: if a run was made with other flags than the study file has now.
    """
    left: dict[Run, list[str]] = {}
    for run in runs:
        folder = output / str(run)
        finished, wanted = done(folder), settings(study, run, evaluations)
        for name, setting in wanted.items():
            if name in finished and finished[name]["setting"] != setting:
                raise UserError(
                    f"{folder} has the {name} of other flags than the study file has now; remove the folder, or choose "
                    "another --output."
                )
        names = [name for name in wanted if name not in finished]
        if names:
            left[run] = names
    return left


class _Processes:
    """Child processes, none of which starts after `stop`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> bool:
        """Run a command with its output in a log; return whether it succeeded."""
        with self._lock:
            if self.stopped:
                return False
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._running.add(process)
        try:
            return process.wait() == 0
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Terminate all processes, and start no more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


def execute(
    study: Study,
    left: Mapping[Run, Sequence[str]],
    output: Path,
    workers: int,
    devices: Sequence[str],
    progress: Callable[[Run, float, bool], Any],
) -> list[Run]:
    """Run the missing commands, `workers` runs at a time; return the runs that failed.

    Args:
        study: the study.
        left: names of the missing commands, see `missing`.
        output: folder of the runs' folders.
        workers: number of processes at a time.
        devices: accelerators as in CUDA_VISIBLE_DEVICES, which the processes share out; empty: they use the CPU.
        progress: callback, called after each run with its seconds and whether it succeeded.
    """
    places: queue.Queue[int] = queue.Queue()
    for place in range(workers):
        places.put(place)
    processes = _Processes()

    def work(run: Run) -> tuple[float, bool]:
        place, began = places.get(), time.perf_counter()
        environment = without_ranks(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
        try:
            succeeded = all(_do(study, run, name, output / str(run), environment, processes) for name in left[run])
            return time.perf_counter() - began, succeeded
        finally:
            places.put(place)

    failed: list[Run] = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, run): run for run in left}
        try:
            for future in as_completed(futures):
                seconds, succeeded = future.result()
                if not succeeded:
                    failed.append(futures[future])
                progress(futures[future], seconds, succeeded)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


def _do(study: Study, run: Run, name: str, folder: Path, environment: Mapping[str, str], processes: _Processes) -> bool:
    """Run one command of a run and record it if it succeeds; return whether it did."""
    if name == TRAINING and (folder / LOG).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = commands(study, run, folder, [] if name == TRAINING else [name])[name]
    command = [str(_ROOT / word) if word.startswith("tools/") else word for word in command]
    began = time.perf_counter()
    with open(folder / LOG, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        if not processes.run(command, log, environment):
            return False
    setting = settings(study, run, [] if name == TRAINING else [name])[name]
    seconds = round(time.perf_counter() - began, 1)
    report.write_json(folder / DONE, {**done(folder), name: {"setting": setting, "seconds": seconds}})
    return True


def _flags(overrides: Overrides) -> list[str]:
    return [f"--{key}" if value is None else f"--{key}={value}" for key, value in overrides.items()]


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")
