"""Session set-up, shared fixtures, and the distribution of test files over the pytest-xdist workers."""

import contextlib
import gc
import logging
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support import zygote

# Files that run in the same worker, since they share the trained model. Each other file is a group.
GROUPS = {
    "test_inference": "trained",
    "test_serving": "trained",
    "test_evaluation_tools": "trained",
    "test_prompt_memory": "trained",
    "test_published_evaluations": "trained",
}
# Groups that start first, the longest ones; the other groups follow, and the short unit tests are last.
FIRST = (
    "test_distributed", "test_sharded_step", "test_context", "test_experts", "test_faults", "test_resume", "trained",
    "test_recipes", "test_mistakes",
)  # fmt: skip
# Last files of tests/gpu: they start processes, which takes longest.
LAST = ("test_runs", "test_layouts")


def pytest_configure(config: pytest.Config) -> None:
    """Start the zygote in the session's main process; prepare torchtitan in the processes that run tests."""
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not on_gpu:
        # These are CPU tests, and a process that has initialised CUDA cannot fork ranks that use it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    worker, distributed = hasattr(config, "workerinput"), config.option.dist != "no" and not config.option.collectonly
    if not worker and not on_gpu and not config.option.collectonly:
        session = zygote.zygote()
        session.__enter__()
        config.add_cleanup(lambda: session.__exit__(None, None, None))
    if worker or not distributed:
        from memdlm_dist.runtime import cpu  # not at the top: the controller of the workers needs no torch

        cpu.prepare()


class FileGroups(LoadScopeScheduling):
    """Scheduler that keeps a file, or the files of one group, in one worker, since module fixtures start processes.

    pytest-xdist 3.8 groups by marks, which pytest 9.2 no longer passes on to the scheduler.
    """

    def _split_scope(self, nodeid: str) -> str:
        stem = PurePosixPath(nodeid.split("::")[0]).stem
        return GROUPS.get(stem, stem)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileGroups:
    return FileGroups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by the order in which their groups start."""

    def group_of(item: pytest.Item) -> str:
        return GROUPS.get(item.path.stem, item.path.stem)

    def rank(item: pytest.Item) -> int:
        group = group_of(item)
        if group in FIRST:
            return FIRST.index(group)
        if group in LAST:
            return len(FIRST) + 2 + LAST.index(group)
        return len(FIRST) + ("unit" in item.path.parts)

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # garbage collections then skip the imported objects


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Limit torch to one thread: the suite runs several processes on few cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_stale_log_handlers():
    """Remove log handlers after each test: torchtitan's handler keeps the captured stream of that test."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def root() -> Path:
    return zygote.ROOT


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Train a small model for two steps and run workers/reading.py on every layout; return the folder."""
    from tests.support.launching import run_many
    from tests.workers import reading

    folder = tmp_path_factory.mktemp("trained")
    run_many([(1, reading.training(folder))])
    for name, (processes, _) in reading.LAYOUTS.items():
        status, output = zygote.run(processes, "tests.workers.reading:read_rank", folder, name)
        assert status == 0, output
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_process_group():
    """Leave the process group that a file's tests have left, such as a model whose checkpoint could not be read.

    The order of the files in a worker depends on their durations, and some files initialise a group themselves.
    """
    yield
    import torch.distributed as dist  # here, so that the session's main process need not import torch

    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def few_open_files():
    """Remove the shared memory of streaming that a file's tests have left.

    streaming keeps every data set's memory until the process exits, and each new data set opens all earlier ones: the
    number of open files grows with the square of the number of data sets. The memory of a fixture must last as long as
    the file's tests.
    """
    yield
    if (memory := sys.modules.get("streaming.base.shared.memory")) is None:
        return
    for x in gc.get_objects():
        if issubclass(type(x), memory.SharedMemory):  # isinstance would follow a weak proxy, whose object may be gone
            with contextlib.suppress(BufferError):  # still in use
                x.cleanup()
                # A second clean-up would remove the memory of another process that has taken the name.
                x.created_shms.clear()
                x.opened_shms.clear()
