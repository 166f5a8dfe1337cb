"""Runs of a study: training and evaluations as processes, several at a time, each exactly once.

Every run has a folder ARM-SEED with the output of its training, one folder for each evaluation, and `done.json`: the
commands that have succeeded. A second call starts only what is missing. Every process is a run on one rank.
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

from memdlm_dist.errors import UserError
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


def done(folder: Path) -> dict[str, Any]:
    """Return what has succeeded in a run's folder: name -> {"command", "seconds"}."""
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
        finished = done(folder)
        wanted = commands(study, run, folder, evaluations)
        for name, command in wanted.items():
            # The interpreter's path is not part of the setting.
            if name in finished and finished[name]["command"] != " ".join(command[1:]):
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
    progress: Callable[[Run, float, str | None], Any],
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
    threads = max(1, cores() // workers)
    stop = threading.Event()
    processes: set[subprocess.Popen[bytes]] = set()

    def work(run: Run) -> tuple[float, str | None]:
        place, began = places.get(), time.perf_counter()
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = str(place % devices)
        folder = output / str(run)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, command in commands(study, run, folder, list(study.evaluations)).items():
                if stop.is_set():
                    break
                if name in left[run] and not _start(command, folder, name, environment, processes):
                    return time.perf_counter() - began, str(folder / LOG)
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


def _start(
    command: list[str], folder: Path, name: str, environment: Mapping[str, str], processes: set[subprocess.Popen[bytes]]
) -> bool:
    """Run one command with its output in the run's log; record it if it succeeds, and return whether it did."""
    began = time.perf_counter()
    with open(folder / LOG, "ab") as log:
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        executable = [command[0], *(str(_ROOT / word) if word.startswith("tools/") else word for word in command[1:])]
        process = subprocess.Popen(executable, stdout=log, stderr=subprocess.STDOUT, env=environment)
        processes.add(process)
        try:
            status = process.wait()
        finally:
            processes.discard(process)
    if status == 0:
        seconds = round(time.perf_counter() - began, 1)
        report.write_json(folder / DONE, {**done(folder), name: {"command": " ".join(command[1:]), "seconds": seconds}})
    return status == 0


def _flags(overrides: Overrides) -> list[str]:
    return [f"--{key}" if value is None else f"--{key}={value}" for key, value in overrides.items()]


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


def cores() -> int:
    """Return the number of CPU cores of this process."""
    return len(os.sched_getaffinity(0))
