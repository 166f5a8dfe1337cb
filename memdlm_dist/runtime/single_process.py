"""Environment of a single process that runs without torchrun."""

import contextlib
import os
import random
import socket
from collections.abc import Mapping

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """Return a free port on 127.0.0.1, from 10000 to 32767.

    Linux by default gives connections the ports from 32768 on, so a port of that range could be taken between this call
    and the listener's start.
    """
    choose = random.SystemRandom()  # forked processes would share the state of the default generator
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := choose.randrange(10000, 32768)))
            return port
    raise OSError("No port of 127.0.0.1 is free.")


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without torchrun's variables, for a child process that is a single process of its own."""
    return {name: value for name, value in environment.items() if name not in _VARIABLES}


def single_process_environment() -> None:
    """Set the environment variables that torchrun sets, unless they are set: one rank, a free port on 127.0.0.1."""
    for name, value in zip(_VARIABLES, (0, 0, 1, 1, "127.0.0.1", free_port()), strict=True):
        os.environ.setdefault(name, str(value))
