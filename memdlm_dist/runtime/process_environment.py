"""Environment variables of the processes that a command starts: CUDA allocator settings and number of threads.

torch reads the allocator settings at import, so the parent process sets them.
"""

import os
from pathlib import Path

# torch 2.9 and later read the first one; the others are older names.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_THREADS = "OMP_NUM_THREADS"
# CPU limit of a container (cgroup 2): CPU time per period and length of the period, both in microseconds.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_process_environment(processes: int) -> None:
    """Set allocator and thread variables in `os.environ`, unless the user has set them.

    Args:
        processes: number of processes that share the cores of this node.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        # Activation sizes change from step to step with packed rows and with the number of masked tokens.
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault(_THREADS, str(max(1, available_cores() // processes)))


def available_cores() -> int:
    """Return the number of CPU cores that this process may use: CPU affinity and container limit."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup 2, or the limit is "max"
        return cores
