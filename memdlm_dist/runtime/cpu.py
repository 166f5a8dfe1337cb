"""CPU support: patches that torchtitan and streaming need on a machine without an accelerator.

torchtitan 0.2 falls back to "cuda" if it finds no accelerator, and calls functions of the device module that
`torch.cpu` does not have.
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
    """Patch torchtitan and streaming so that they run on this machine; with an accelerator torchtitan is not patched.

    Entry points call this before they import torchtitan or any other module of the package: torchtitan chooses the
    device type at its first import.
    """
    # streaming imports torchvision for its vision datasets, and a CUDA build of torchvision does not load with a CPU
    # build of torch. We stream tokens only.
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    if has_accelerator():
        return
    compat.use_cpu(_memory_stats, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    from memdlm_dist.compat.torchtitan import use_cpu_permutation  # not at the top: it imports torchtitan

    use_cpu_permutation()


def check_prepared() -> None:
    """Raise an error if `prepare` is needed and was not called.

    Raises:
        UserError: if this machine has no accelerator and `prepare` was not called.
    """
    if not has_accelerator() and not hasattr(torch.histc, "of_integers"):
        raise UserError(
            "This machine has no accelerator and torchtitan is not patched for the CPU; call "
            "memdlm_dist.runtime.cpu.prepare() before importing torchtitan or any other module of memdlm_dist."
        )


def _memory_stats() -> dict[str, int]:
    """Return what torchtitan reads from `torch.cuda.memory_stats`, with the peak memory of the process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB
    return {
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }
