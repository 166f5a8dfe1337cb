"""Entry point of worker processes, which patches torchtitan for the CPU before anything imports it."""

import pickle
from typing import Any

from memdlm_dist.runtime import cpu


def do(content: bytes) -> tuple[int, Any]:
    """Do a job that `pack` made, and return its unit's number and its result."""
    cpu.prepare()
    action, job = pickle.loads(content)  # made by the command that started this process
    return job.unit.number, action(job)


def pack(action: Any, job: Any) -> bytes:
    """Return a job as bytes: a worker may import the job's classes only after `cpu.prepare`."""
    return pickle.dumps((action, job))
