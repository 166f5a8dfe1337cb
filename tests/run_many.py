"""The training entry point many times over, on several ranks, for one start of Python.

    python tests/run_many.py JSON

JSON is a list of [processes, arguments]. Importing torch and torchtitan costs ten times what a few debug
steps do, so this imports once and forks the ranks of each run, one run after the other. Each run has
fresh processes and a rendezvous of its own.
"""

import json
import os
import signal
import socket
import sys
import time
from types import SimpleNamespace

from memdlm_dist import train

# torchtitan sleeps two seconds at the end of every run.
sys.modules["torchtitan.train"].time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)


def rank(number: int, world_size: int, port: int, arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        status = train.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(world_size: int, arguments: list[str]) -> int:
    """Returns the first status that is not zero; the other ranks are then killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = set()
    for number in range(world_size):
        child = os.fork()
        if not child:
            rank(number, world_size, port, arguments)
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


if __name__ == "__main__":
    for world_size, arguments in json.loads(sys.argv[1]):
        status = run(world_size, arguments)
        print(f"status {status}: {world_size} x {' '.join(arguments)}", flush=True)
        if status:
            sys.exit(1)
