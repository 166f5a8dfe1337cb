"""tools/prepare_data.py in a process of the zygote, with work on units that goes wrong.

Its workers are forked from that process, which has imported everything and has hardly any threads. In a process that
runs tests another thread could hold a lock at the moment of the fork, and the worker would wait for it forever.
"""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from joblib.externals.loky.backend import context

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data.preparation import prepare, progress
from memdlm_dist.data.preparation.jobs import Job
from memdlm_dist.data.preparation.unit_worker import prepare_unit
from memdlm_dist.data.preparation.work_folder import WorkFolder
from memdlm_dist.data.shards import ShardWriter
from tools import prepare_data


def prepare_rank(
    rank: int,
    argv: list[str],
    mark: Path,
    unit: Callable[[Job], Any],
    change: Callable[[], object] | None,
    limit: int | None,
) -> int:
    """Run the command in a session of its own.

    Args:
        argv: arguments of the command.
        mark: file that gets the process id.
        unit: work on a unit, in place of `prepare_unit`.
        change: function that is called first.
        limit: size of the largest file that can be written, in bytes.
    """
    del rank
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", "`fork` start method should not be used")
    context.set_start_method("fork", force=True)  # a new process takes seconds to import everything
    prepare.prepare_unit = unit
    if change is not None:
        change()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    unfinished = mark.with_suffix(".new")
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(mark)
    try:
        return prepare_data.main(argv)
    except SystemExit as end:  # after a signal
        return end.code


# Work on a unit that goes wrong; workers find these functions by name.


def dying_unit(job):
    """Kill this worker after the shards of a unit, before its record, as often as the file `deaths/UNIT` says."""
    mark = Path(str(job.config.output)).with_name("deaths") / str(job.unit.number)
    if mark.exists() and (left := int(mark.read_text())):
        mark.write_text(str(left - 1))
        WorkFolder.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return prepare_unit(job)


def never_begun(job):
    os.kill(os.getpid(), signal.SIGKILL)


def slow_unit(job):
    time.sleep(0.4)
    return prepare_unit(job)


def endless_unit(job):
    if job.unit.number > 1:
        job.begin()
        time.sleep(600)
    return prepare_unit(job)


# Changes of the whole command.


def frequent_progress():
    progress._LINE, progress._REFRESH = 0.02, 0.01


def mistaken_writer():
    ShardWriter.write = lambda *_: 1 / 0
