"""Peak memory of a function call: the allocator's on an accelerator, the resident set's on CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from memdlm_dist.runtime.device import device_module, device_type


def peak_memory(run: Callable[[], None]) -> tuple[int, int]:
    """Measure the peak memory of `run()`: the peak in bytes, and its increase over the memory in use before."""
    gc.collect()
    before = _start()
    run()
    if device_type() != "cpu":
        device_module().synchronize()
        return device_module().max_memory_allocated(), device_module().max_memory_allocated() - before
    peak = _resident("VmHWM")
    return peak, peak - before


def _start() -> int:
    """Reset the peak, and return the bytes in use."""
    if device_type() != "cpu":
        device_module().empty_cache()
        device_module().reset_peak_memory_stats()
        return device_module().memory_allocated()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # glibc: return freed blocks of 64 KiB or more to the system at once, so that resident memory is memory in use.
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2**16))
        libc.malloc_trim(ctypes.c_size_t(0))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
