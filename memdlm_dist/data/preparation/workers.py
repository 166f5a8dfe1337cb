"""Workers: processes of this machine through joblib, or a Dask or Ray cluster."""

import asyncio
import logging
import os
import re
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import joblib

from memdlm_dist.compat.joblib import WORKER_ENDED
from memdlm_dist.data.preparation.jobs import RUNNING, Job
from memdlm_dist.data.preparation.worker_process import do, pack
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line

T = TypeVar("T")

_ATTEMPTS = 3  # of a unit whose worker process ends; Dask's default is the same
_CONNECTING = 20.0  # seconds for which a Dask cluster is awaited
_SCHEMES = ("dask", "ray")


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

    With one worker the jobs are done in this process.

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
                for number, result in pool(joblib.delayed(do)(pack(action, job)) for job in todo):
                    ends = 0
                    yield waiting.pop(number), result
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
                if ended[number] >= _ATTEMPTS:
                    raise _interrupted_error(waiting[number], "lower --workers") from None
            numbers = ", ".join(map(str, sorted(interrupted))) or "none"
            codes = re.search(r"exit codes? .*?(\{.*\})", str(error))
            print(
                "A worker process ended unexpectedly, perhaps for lack of memory"
                f"{f' {codes[1]}' if codes else ''}; its units are done again (in progress: {numbers}).",
                file=sys.stderr,
            )


def _interrupted_error(job: Job, remedy: str) -> UserError:
    return UserError(
        f"Unit {job.unit} was interrupted {_ATTEMPTS} times because a worker process ended, perhaps for lack of "
        f"memory; {remedy}, or look for an enormous row in its files. Finished units are kept: the same command goes "
        "on from there."
    )


def _interrupted(scratch: str) -> set[int]:
    """Return the units that were in progress, and remove their marks."""
    marks = list(Path(scratch, RUNNING).glob("*"))
    for mark in marks:
        mark.unlink(missing_ok=True)
    return {int(mark.name) for mark in marks}


def _on_cluster(action: Callable[[Job], T], jobs: Sequence[Job], address: str) -> Iterator[tuple[Job, T]]:
    shared = [replace(job, parallel=True) for job in jobs]
    scheme, _, host = address.partition("://")
    try:
        yield from (_on_dask if scheme == "dask" else _on_ray)(action, shared, host)
    except (UserError, GeneratorExit):
        raise
    except (Exception, asyncio.CancelledError) as error:  # each cluster has different error classes
        raise UserError(
            f"The cluster {address} failed ({type(error).__name__}: {one_line(error)}); look at its log. Finished "
            "units are kept: the same command goes on from there."
        ) from None


def _on_dask(action: Callable[[Job], T], jobs: Sequence[Job], host: str) -> Iterator[tuple[Job, T]]:
    """Do jobs on a Dask cluster by Dask's own client: joblib's waits forever for the job of a worker that is killed."""
    from distributed import Client, KilledWorker, as_completed

    logging.getLogger("distributed.utils").setLevel(logging.CRITICAL)  # tracebacks of a lost connection
    with Client(f"tcp://{host}", timeout=_CONNECTING, set_as_default=False) as client:
        waiting, submitted = deque(jobs), as_completed(loop=client.loop)
        by_key: dict[str, Job] = {}

        def submit() -> None:
            """Submit one job for each thread: Dask blames all jobs that a worker has when it ends."""
            while waiting and len(by_key) < max(sum(client.nthreads().values()), 1):
                job = waiting.popleft()
                key = f"unit-{job.unit.number}-{uuid.uuid4().hex}"
                by_key[key] = job
                submitted.add(client.submit(do, pack(action, job), key=key, pure=False))

        submit()
        for future in submitted:
            job = by_key.pop(future.key)
            try:
                _, result = future.result()
                yield job, result
            except KilledWorker:
                raise _interrupted_error(job, "give the cluster's workers more memory") from None
            submit()


def _on_ray(action: Callable[[Job], T], jobs: Sequence[Job], host: str) -> Iterator[tuple[Job, T]]:
    """Do jobs on a Ray cluster as tasks: its joblib backend returns results only when all jobs have ended."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    ray.init(address=f"ray://{host}", log_to_driver=False)
    try:
        task = ray.remote(max_retries=_ATTEMPTS - 1)(do)
        waiting = deque(jobs)
        running: dict[ray.ObjectRef, Job] = {}
        while waiting or running:
            while waiting and len(running) < max(int(ray.cluster_resources().get("CPU", 1)), 1):
                job = waiting.popleft()
                running[task.remote(pack(action, job))] = job
            (ended,), _ = ray.wait(list(running))
            job = running.pop(ended)
            try:
                _, result = ray.get(ended)
                yield job, result
            except (WorkerCrashedError, OutOfMemoryError):
                raise _interrupted_error(job, "give the cluster's workers more memory") from None
            except RayTaskError as error:
                raise error.cause from None
    finally:
        ray.shutdown()
