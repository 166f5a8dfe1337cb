"""Machines without an accelerator: what torchtitan and streaming lack there. No effect on others.

torchtitan 0.2 takes "cuda" when it finds no accelerator and asks its device module for what `torch.cpu` does not have.
"""

import os
import resource
import sys
from types import ModuleType

import torch

from memdlm_dist.compat import torch as compat
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.device import has_accelerator


def prepare() -> None:
    """Make torchtitan and streaming run on this machine. Entry points call it before they import anything else of
    the package: torchtitan decides on the device type when it is first imported."""
    # streaming imports torchvision for its vision datasets, and a torchvision that was built for CUDA fails to load
    # beside a CPU build of torch. We stream tokens only.
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    if has_accelerator():
        return
    compat.use_cpu(_memory_stats, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    from memdlm_dist.compat.torchtitan import use_cpu_permutation  # not above: it imports torchtitan

    use_cpu_permutation()


def check_prepared() -> None:
    """
    Raises:
        UserError: if this machine has no accelerator and `prepare` was not called.
    """
    if not has_accelerator() and not hasattr(torch.histc, "of_integers"):
        raise UserError(
            "This machine has no accelerator, and torchtitan does not know that; call "
            "memdlm_dist.runtime.cpu.prepare() before torchtitan or anything else of memdlm_dist is imported."
        )


def _memory_stats() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }
