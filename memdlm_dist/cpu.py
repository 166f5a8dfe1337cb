"""What makes torchtitan and streaming run where there is no accelerator.

torchtitan 0.2 falls back to "cuda" when it finds no accelerator and asks its device module for
things that `torch.cpu` does not have. Nothing in this file has any effect on a machine that has one.
"""

import os
import platform
import resource
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def has_accelerator() -> bool:
    return torch.accelerator.is_available()


def prepare() -> None:
    """Make `import torchtitan` and `import streaming` work; call before the first import of either."""
    # streaming imports torchvision for its vision datasets, and a torchvision that was built for
    # CUDA fails to load beside a CPU build of torch. We stream tokens only.
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    if has_accelerator():
        return
    torch._utils._get_available_device_type = lambda: "cpu"
    cpu: Any = torch.cpu
    cpu.current_device = lambda: 0
    cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=_total_memory())
    cpu.memory_stats = lambda device=None: _memory_stats()
    cpu.reset_peak_memory_stats = lambda device=None: None
    cpu.empty_cache = lambda: None
    torch.histc = _histc_of_integers(torch.histc)


def prepare_experts() -> None:
    """Make torchtitan's mixture of experts run: its token permutation is a Triton kernel."""
    if has_accelerator():
        return
    # Not above: this import needs `prepare` to have been called.
    from torchtitan.models.moe import kernels, utils

    utils.generate_permute_indices = partial(kernels.generate_permute_indices, use_cpu=True)


def prepare_collectives(model: torch.nn.Module) -> None:
    """Let FSDP2 reduce gradients on gloo, which has no pre-multiplied sum."""
    if has_accelerator():
        return
    for module in model.modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _histc_of_integers(histc: Any) -> Any:
    """`torch.histc`, which on a CPU does not take integers; torchtitan counts with it the tokens of each expert."""

    def counted(x: torch.Tensor, bins: int, min: int = 0, max: int = 0, **rest: Any) -> torch.Tensor:
        if x.is_floating_point() or (min, max) != (0, bins):
            found: torch.Tensor = histc(x, bins, min, max, **rest)
            return found
        return torch.bincount(x, minlength=bins)

    return counted


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_stats() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {
        "active_bytes.all.peak": peak,
        "reserved_bytes.all.peak": peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }
