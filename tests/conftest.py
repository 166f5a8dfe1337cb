"""Session set-up, shared fixtures, and how pytest-xdist deals out the files."""

import gc
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.support import zygote

# Files that run together in one worker: one process pool, or one trained model. Every other file is a group of its own.
GROUPS = {
    "test_sharded_step": "pool", "test_experts": "pool", "test_context": "pool", "test_initial_weights": "pool",
    "test_skipped_steps": "pool",
    "test_inference": "trained", "test_evaluation_tools": "trained",
}  # fmt: skip
# Dealt out in this order, the longest first; the rest follow, and the short unit tests fill up the end.
FIRST = ("test_distributed", "pool", "test_resume", "test_faults", "test_mistakes", "trained", "test_recipes")
# The last of tests/gpu: their runs start processes, which takes longest.
LAST = ("test_runs", "test_layouts")


def pytest_configure(config: pytest.Config) -> None:
    """Start the zygote where the session begins; prepare the machine where tests run."""
    on_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not on_gpu:
        # The tests are of the CPU, and a process that has looked at a GPU cannot fork ranks that use it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    worker, distributed = hasattr(config, "workerinput"), config.option.dist != "no" and not config.option.collectonly
    if not worker and not on_gpu and not config.option.collectonly:
        session = zygote.zygote()
        session.__enter__()
        config.add_cleanup(lambda: session.__exit__(None, None, None))
    if worker or not distributed:
        from memdlm_dist.runtime import cpu  # not above: the controller of the workers needs no torch

        cpu.prepare()


class FileGroups(LoadScopeScheduling):
    """Keeps a file, or the files of one group, in one worker: module fixtures start processes.

    pytest-xdist 3.8 does so by marks, which pytest 9.2 no longer shows it.
    """

    def _split_scope(self, nodeid: str) -> str:
        stem = PurePosixPath(nodeid.split("::")[0]).stem
        return GROUPS.get(stem, stem)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileGroups:
    return FileGroups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by how they are dealt out."""

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
    gc.freeze()  # collections leave alone what is imported


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    """The suite runs several processes on few cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_stale_log_handlers():
    """torchtitan's log handler keeps the captured stream of the test that made it."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def root() -> Path:
    return zygote.ROOT


@pytest.fixture(scope="session")
def pools():
    """Gloo ranks by world size, which stay for the whole session: `pools(4).call("module:function", ...)`."""
    made: dict[int, zygote.RankPool] = {}

    def pool(processes: int) -> zygote.RankPool:
        return made.setdefault(processes, zygote.RankPool(processes))

    yield pool
    for each in made.values():
        each.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small model, trained for two steps, and what workers/reading.py found on every layout."""
    from tests.support.launching import run_many
    from tests.workers import reading

    folder = tmp_path_factory.mktemp("trained")
    run_many([(1, reading.training(folder))])
    for name, (processes, _) in reading.LAYOUTS.items():
        status, output = zygote.run(processes, "tests.workers.reading:read_rank", folder, name)
        assert status == 0, output
    return folder
