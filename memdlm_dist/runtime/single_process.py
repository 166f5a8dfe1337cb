"""One process without torchrun."""

import os
import socket


def single_process_environment() -> None:
    """Set what torchrun sets, where nobody has, so that one process also runs without it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():  # fmt: skip
        os.environ.setdefault(name, str(value))
