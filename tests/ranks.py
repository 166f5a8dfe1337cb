"""Several ranks for one start of Python: importing torch and torchtitan costs ten times what a small step does."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable


def fork(world_size: int, body: Callable[[int], int]) -> int:
    """Fork the ranks of one run, with torchrun's environment and a rendezvous of their own.

    Returns:
        The first exit status that is not zero; the other ranks are then killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = set()
    for number in range(world_size):
        child = os.fork()
        if not child:
            _rank(number, world_size, port, body)
        children.add(child)
    failure = 0
    while children:
        child, wait_status = os.wait()
        children.discard(child)
        status = os.waitstatus_to_exitcode(wait_status)
        if status and not failure:
            failure = status
            for other in children:
                os.kill(other, signal.SIGKILL)
    return failure


def _rank(number: int, world_size: int, port: int, body: Callable[[int], int]) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        status = body(number)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
