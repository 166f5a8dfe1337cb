"""Workers: processes of this machine, or a Dask or Ray cluster, both through joblib."""

import contextlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import joblib

from memdlm_dist.compat.joblib import WORKER_ENDED
from memdlm_dist.data.preparation.jobs import RUNNING, Job
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line

T = TypeVar("T")

_ATTEMPTS = 3  # of a unit whose worker process ends
_SCHEMES = ("dask", "ray")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_cluster(address: str) -> None:
    """Check the address of a cluster, and that its package is installed.

    Raises:
        UserError: if the address is wrong or a package is missing.
    """
    scheme, _, rest = address.partition("://")
    require(
        scheme in _SCHEMES and bool(rest),
        f"--cluster {address} is not the address of a cluster; give dask://HOST:PORT or ray://HOST:PORT.",
    )
    package = {"dask": "distributed", "ray": "ray"}[scheme]
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(
            f"--cluster {address} needs a package that is not installed ({one_line(error)}); "
            "pip install 'memdlm_dist[cluster]'."
        ) from None


def results(
    action: Callable[[Job], T], jobs: Sequence[Job], workers: int, cluster: str | None = None
) -> Generator[tuple[Job, T], None, None]:
    """Do jobs and yield each with its result, in the order in which they end.

    With one worker the jobs are done in this process, where the tokenizer may use all cores.

    Args:
        action: a function of a module, such that a worker can import it.
        workers: number of processes.
        cluster: address of a cluster, which then does the work.

    Raises:
        UserError: from a job; if a worker ends `_ATTEMPTS` times during the same job; if the cluster fails.
    """
    if cluster is not None:
        yield from _on_cluster(action, jobs, cluster)
    elif min(workers, len(jobs)) <= 1:
        for job in jobs:
            yield job, action(job)
    else:
        yield from _in_processes(action, jobs, min(workers, len(jobs)))


def _do(action: Callable[[Job], T], job: Job) -> tuple[Job, T]:
    return job, action(job)


def _in_processes(action: Callable[[Job], T], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, T]]:
    waiting = {job.unit.number: replace(job, parallel=True, parent=os.getpid()) for job in jobs}
    ended: Counter[int] = Counter()
    ends = 0  # since the last result
    while waiting:
        # The end of one worker ends them all. So a unit's last attempt is made alone, where no other unit can end it.
        alone = next((job for number, job in waiting.items() if ended[number] == _ATTEMPTS - 1), None)
        todo = list(waiting.values()) if alone is None else [alone]
        try:
            with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
                pool = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
                for job, result in pool(joblib.delayed(_do)(action, job) for job in todo):
                    del waiting[job.unit.number]
                    ends = 0
                    yield job, result
        except WORKER_ENDED as error:
            interrupted = _interrupted(jobs[0].scratch) & waiting.keys()
            ended.update(interrupted)
            ends += 1
            require(
                bool(interrupted) or ends < _ATTEMPTS,
                f"Worker processes end before they begin with a unit ({one_line(error)}); free memory, or lower "
                "--workers. Finished units are kept: the same command goes on from there.",
            )
            for number in sorted(interrupted):
                require(
                    ended[number] < _ATTEMPTS,
                    f"Unit {waiting[number].unit} was interrupted {_ATTEMPTS} times because a worker process ended, "
                    "perhaps for lack of memory; lower --workers, or look for an enormous row in its files. Finished "
                    "units are kept: the same command goes on from there.",
                )
            numbers = ", ".join(map(str, sorted(interrupted))) or "none"
            print(
                f"A worker process ended unexpectedly, perhaps for lack of memory; its units are done again (in "
                f"progress: {numbers}).",
                file=sys.stderr,
            )


def _interrupted(scratch: str) -> set[int]:
    """Return the units that were in progress, and remove their marks."""
    marks = list(Path(scratch, RUNNING).glob("*"))
    for mark in marks:
        mark.unlink(missing_ok=True)
    return {int(mark.name) for mark in marks}


def _on_cluster(action: Callable[[Job], T], jobs: Sequence[Job], address: str) -> Iterator[tuple[Job, T]]:
    shared = [replace(job, parallel=True) for job in jobs]
    try:
        with _backend(address) as (options, how), joblib.parallel_config(**options):
            pool = joblib.Parallel(n_jobs=-1, return_as=how, batch_size=1)
            yield from pool(joblib.delayed(_do)(action, job) for job in shared)
    except UserError:
        raise
    except Exception as error:  # each cluster has different error classes
        raise UserError(
            f"The cluster {address} failed ({type(error).__name__}: {one_line(error)}); look at its log. Finished "
            "units are kept: the same command goes on from there."
        ) from None


@contextlib.contextmanager
def _backend(address: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Connect to a cluster; yield joblib's configuration and the way in which it returns results."""
    scheme, _, host = address.partition("://")
    if scheme == "dask":
        from distributed import Client

        with Client(f"tcp://{host}") as client:
            yield {"backend": "dask", "client": client}, "generator_unordered"
    else:
        import ray
        from ray.util.joblib import register_ray

        ray.init(address=address, log_to_driver=False)
        try:
            with warnings.catch_warnings():
                register_ray()
                yield {"backend": "ray"}, "generator_unordered"
        finally:
            ray.shutdown()
