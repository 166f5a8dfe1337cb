"""Environment of a single process that runs without torchrun."""

import contextlib
import os
import random
import socket
from pathlib import Path


def free_port() -> int:
    """Return a free port on 127.0.0.1, below the ports that the system gives to connections.

    A port of the system's own range may go to any new connection between this call and the listener's start.
    """
    try:
        limit = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        limit = 32768
    choose = random.SystemRandom()  # forked processes would share the state of the default generator
    candidates = [choose.randrange(10000, limit) for _ in range(100)] if limit > 11000 else []
    for candidate in (*candidates, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            return port
    raise OSError("No port of 127.0.0.1 is free.")


def single_process_environment() -> None:
    """Set the environment variables that torchrun sets, unless they are set: one rank, a free port on 127.0.0.1."""
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():  # fmt: skip
        os.environ.setdefault(name, str(value))
