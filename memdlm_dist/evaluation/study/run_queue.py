"""Runs of a study: training and evaluations as processes, several at a time, each exactly once.

Every run has a folder ARM-SEED with the output of its training, one folder for each evaluation, and `done.json`: the
commands that have succeeded. A second call starts only what is missing. Every process is one rank.
"""

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError, require
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.study.arms import Overrides, Study, merged

TRAINING = "training"  # name of the training in done.json
DONE, LOG = "done.json", "study.log"
_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-{self.seed}"


def commands(study: Study, run: Run, folder: Path, evaluations: Sequence[str]) -> dict[str, list[str]]:
    """Return the commands of a run by name, in their order: the training, then the evaluations.

    Args:
        folder: the run's output folder.
        evaluations: names of evaluations.
    """
    arm = study.arms[run.arm]
    seeded = {key: value and value.replace("{seed}", str(run.seed)) for key, value in arm.overrides.items()}
    own = merged(seeded, {"job.dump_folder": str(folder)})
    result = {TRAINING: [sys.executable, "-m", "memdlm_dist.train", "--job.config_file", study.config, *_flags(own)]}
    for name in evaluations:
        evaluation = study.evaluations[name]
        tool, *command = evaluation.tool
        result[name] = [
            *(sys.executable, f"tools/{tool}", *command, study.config, *evaluation.arguments),
            *("--checkpoint", str(folder / "checkpoint"), "--output", str(folder / name), "--overwrite"),
            *_flags(merged(own, evaluation.overrides)),
        ]
    return result


def _settings(study: Study, run: Run, evaluations: Sequence[str]) -> dict[str, str]:
    """Return what identifies the commands of a run by name: their words without interpreter and folder."""
    named = commands(study, run, Path("RUN"), evaluations)
    return {name: " ".join(command[1:]) for name, command in named.items()}


def check(study: Study, runs: Sequence[Run], evaluations: Sequence[str]) -> None:
    """Check the configurations of runs, before hours of training.

    Raises:
        UserError: if an arm's flags are wrong, or leave no held-out losses or no checkpoint to evaluate.
    """
    for run in {run.arm: run for run in runs}.values():
        words = commands(study, run, Path("RUN"), [])[TRAINING]
        try:
            config = parse_config.parse(words[words.index("--job.config_file") :])
        except UserError as error:
            raise UserError(f"The arm {run.arm} cannot run: {error}") from None
        require(
            config.validation.enable and bool(config.data.validation),
            f"The arm {run.arm} measures no held-out loss; set validation.enable and data.validation.",
        )
        require(
            config.checkpoint.enable or not evaluations,
            f"The arm {run.arm} saves no checkpoint to evaluate; set checkpoint.enable, or leave out --evaluations.",
        )


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
        finished, wanted = done(folder), _settings(study, run, evaluations)
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


def execute(
    study: Study,
    left: Mapping[Run, Sequence[str]],
    output: Path,
    workers: int,
    devices: int,
    progress: Callable[[Run, float, Path | None], Any],
) -> list[Run]:
    """Run the missing commands, `workers` runs at a time; return the runs that failed.

    Args:
        study: the study.
        left: names of the missing commands, see `missing`.
        output: folder of the runs' folders.
        workers: number of processes at a time.
        devices: number of accelerators, which the processes share out; 0: processes compute on the CPU.
        progress: callback, called after each run with its seconds and the path of the log if it failed.
    """
    places: queue.Queue[int] = queue.Queue()
    for place in range(workers):
        places.put(place)
    stop = threading.Event()
    processes: set[subprocess.Popen[bytes]] = set()

    def work(run: Run) -> tuple[float, Path | None]:
        place, began = places.get(), time.perf_counter()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % devices)
        folder = output / str(run)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            evaluations = list(study.evaluations)
            settings = _settings(study, run, evaluations)
            for name, command in commands(study, run, folder, evaluations).items():
                if name not in left[run] or stop.is_set():
                    continue
                started = time.perf_counter()
                if not _succeeds(command, folder / LOG, environment, processes):
                    return time.perf_counter() - began, folder / LOG
                seconds = round(time.perf_counter() - started, 1)
                report.write_json(
                    folder / DONE, {**done(folder), name: {"setting": settings[name], "seconds": seconds}}
                )
            return time.perf_counter() - began, None
        finally:
            places.put(place)

    failed: list[Run] = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, run): run for run in left}
        try:
            for future in as_completed(futures):
                seconds, log = future.result()
                if log is not None:
                    failed.append(futures[future])
                progress(futures[future], seconds, log)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                process.terminate()
            raise
    return failed


def _succeeds(
    command: list[str], log_file: Path, environment: Mapping[str, str], processes: set[subprocess.Popen[bytes]]
) -> bool:
    """Run one command with its output in a log, and return whether it succeeded; `processes` has it while it runs."""
    with open(log_file, "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        executable = [command[0], *(str(_ROOT / word) if word.startswith("tools/") else word for word in command[1:])]
        process = subprocess.Popen(executable, stdout=log, stderr=subprocess.STDOUT, env=environment)
        processes.add(process)
        try:
            return process.wait() == 0
        finally:
            processes.discard(process)


def _flags(overrides: Overrides) -> list[str]:
    return [f"--{key}" if value is None else f"--{key}={value}" for key, value in overrides.items()]


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")
