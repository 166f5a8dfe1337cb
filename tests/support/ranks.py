"""Ranks as forked processes of the current process."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from memdlm_dist.errors import EXIT_STATUS as USER_ERROR
from memdlm_dist.runtime.preemption import EXIT_STATUS as PREEMPTED
from memdlm_dist.runtime.single_process import free_port

# Seconds in which rank 0 prints a user error that another rank has met first.
PATIENCE = 30


def fork(world_size: int, body: Callable[[int], int]) -> int:
    """Run `body(rank)` in forked ranks and wait for them; for the returned exit status see `wait`."""
    return wait(start(world_size, body))


def in_group(body: Callable[[], Any]) -> Any:
    """Return `body()`, called in the gloo process group of this rank's environment."""
    import torch  # not at the top: the zygote's clients need no torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = body()
    dist.destroy_process_group()
    return result


def fork_group(world_size: int, body: Callable[[], None]) -> int:
    """Run `body()` in forked ranks of one gloo process group; return the exit status, as `fork` does."""

    def rank(_: int) -> int:
        in_group(body)
        return 0

    return fork(world_size, rank)


def start(world_size: int, body: Callable[[int], int]) -> list[int]:
    """Fork the ranks of one run, with torchrun's environment and a new rendezvous port; return the process ids."""
    port = free_port()
    children = []
    for rank in range(world_size):
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _run(rank, world_size, port, body)
        children.append(child)
    return children


def wait(children: Sequence[int], hang_up: int | None = None) -> int:
    """Wait for processes to end; the first failure kills the others.

    After a user error of another rank, rank 0 is left alive for `PATIENCE` seconds, since most user errors occur on all
    ranks and rank 0 prints them.

    Args:
        children: process ids, of rank 0 first.
        hang_up: file descriptor; once it is readable, the caller no longer waits for the result and all are killed.

    Returns:
        The first exit status that is not zero, or 0.
    """
    running = {os.pidfd_open(child): child for child in children}
    failure, patience = 0, None

    def kill() -> None:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    while running:
        # Not select.select, which takes no file descriptor above 1,023.
        ready = connection.wait([*running, *([] if hang_up is None else [hang_up])], patience)
        if not ready:
            kill()
        if hang_up in ready:
            hang_up = None
            failure = failure or -signal.SIGHUP
            kill()
        for pidfd in ready:
            if pidfd not in running:
                continue
            status = os.waitstatus_to_exitcode(os.waitpid(running.pop(pidfd), 0)[1])
            os.close(pidfd)
            if status and not failure:
                failure = status
                if status == USER_ERROR and children[0] in running.values():
                    patience = PATIENCE
                elif status != PREEMPTED:  # after a stop request all ranks end by themselves
                    kill()
    return failure


def _run(rank: int, world_size: int, port: int, body: Callable[[int], int]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        status = body(rank)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
