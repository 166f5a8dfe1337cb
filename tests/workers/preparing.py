"""tools/prepare_data.py in a process of the zygote, with work on units that goes wrong.

Its workers are forked from that process, which has imported everything and has hardly any threads. In a process that
runs tests another thread could hold a lock at the moment of the fork, and the worker would wait for it forever.
"""

import importlib
import os
import resource
import signal
import time
import warnings
from pathlib import Path

from joblib.externals.loky.backend import context

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data.preparation import prepare, progress
from memdlm_dist.data.preparation.unit_worker import prepare_unit
from memdlm_dist.data.preparation.work_folder import WorkFolder
from memdlm_dist.data.shards import ShardWriter
from tools import prepare_data


def prepare_rank(rank: int, argv: list[str], mark: str, setup: str | None, limit: int | None) -> int:
    """Run the command in a session of its own.

    Args:
        argv: arguments of the command.
        mark: file that gets the process id.
        setup: name of a function of this module, which is called first.
        limit: size of the largest file that can be written, in bytes.
    """
    del rank
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", "`fork` start method should not be used")
    context.set_start_method("fork", force=True)  # a new process takes seconds to import everything
    if setup is not None:
        getattr(importlib.import_module(__name__), setup)()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    Path(mark).with_suffix(".new").write_text(str(os.getpid()))
    Path(mark).with_suffix(".new").rename(mark)
    try:
        return prepare_data.main(argv)
    except SystemExit as end:  # after a signal
        return end.code


# Functions that set the command up.


def dying_workers() -> None:
    prepare.prepare_unit = _dying_unit


def workers_that_never_begin() -> None:
    prepare.prepare_unit = _never_begun


def slow_workers() -> None:
    prepare.prepare_unit = _slow_unit


def endless_workers() -> None:
    prepare.prepare_unit = _endless_unit


def frequent_progress() -> None:
    progress._LINE, progress._REFRESH = 0.02, 0.01
    prepare.prepare_unit = _slow_unit


def mistaken_workers() -> None:
    ShardWriter.write = lambda *_: 1 / 0


# Work on a unit that goes wrong; workers find these functions by name.


def _dying_unit(job):
    """Kill this worker after the shards of a unit, before its record, as often as the file `deaths/UNIT` says."""
    mark = Path(str(job.config.output)).with_name("deaths") / str(job.unit.number)
    if mark.exists() and (left := int(mark.read_text())):
        mark.write_text(str(left - 1))
        WorkFolder.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return prepare_unit(job)


def _never_begun(job):
    os.kill(os.getpid(), signal.SIGKILL)


def _slow_unit(job):
    time.sleep(0.4)
    return prepare_unit(job)


def _endless_unit(job):
    if job.unit.number > 1:
        job.begin()
        time.sleep(600)
    return prepare_unit(job)
