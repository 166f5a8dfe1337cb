"""Environment of a single process that runs without torchrun."""

import os
import socket


def single_process_environment() -> None:
    """Set the environment variables that torchrun sets, unless they are set: one rank, a free port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():  # fmt: skip
        os.environ.setdefault(name, str(value))
