"""Shared fixtures. Importing memdlm_dist first prepares torchtitan for machines without an accelerator."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

ROOT = Path(__file__).parent.parent
# The oracles and helpers beside the tests, and the tools, which are scripts.
sys.path[:0] = [str(ROOT / "tests")]


@pytest.fixture(autouse=True)
def one_thread():
    """The suite runs several processes on few cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_stale_log_handlers():
    """torchtitan's log handler keeps the captured stream of the test that made it."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small model, trained for two steps, and what reading.py found on every layout."""
    from launching import run_script

    folder = tmp_path_factory.mktemp("trained")
    run_script("tests/reading.py", str(folder))
    return folder
