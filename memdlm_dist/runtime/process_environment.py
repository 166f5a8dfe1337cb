"""Environment variables of the processes that a command starts: the allocator's settings and the number of threads.

torch reads the allocator's when it is imported, so they are set in the process that starts the others.
"""

import os
from pathlib import Path

# torch 2.9 and later read the first; the others are its older names.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_THREADS = "OMP_NUM_THREADS"
# A container's share of the cores (cgroup 2): microseconds of processor time in a period, and the period.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_process_environment(processes: int) -> None:
    """Set in `os.environ` what the user has not set.

    Args:
        processes: number of processes on this node, which share its cores.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        # Activations of packed rows and of varying numbers of masked tokens differ in size from step to step.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault(_THREADS, str(max(1, available_cores() // processes)))


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores
