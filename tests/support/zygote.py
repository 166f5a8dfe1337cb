"""Zygote: a process that has imported all heavy modules and forks the ranks of the test runs.

Importing torch, torchtitan, streaming and the tokenizers takes seconds; a few steps of a small model take less than one
second. The pytest session starts one zygote for all pytest-xdist workers. The zygote has a single thread and never uses
autograd or a process group itself. For each connection to its socket it forks a server, which forks the ranks of a
`RunRequest`: they call `function(rank, *arguments)`, which returns an exit status. Functions are named
"module:function"; arguments are pickled.

No rank outlives its request: each gloo group has a thread that wakes up 100 times a second, also when idle.
"""

import contextlib
import gc
import importlib
import os
import pickle
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support import ranks

ROOT = Path(__file__).parents[2]
ADDRESS = "MEMDLM_TEST_ZYGOTE"  # environment variable: path of the socket
# Seconds; longer than any run takes on a busy machine.
TIMEOUT = 500
IMPORTS = (
    "memdlm_dist.train", "memdlm_dist.inference.trained_model", "memdlm_dist.evaluation.exposure",
    "memdlm_dist.performance.bench_steps", "tests.workers.run_many", "tests.workers.reading",
    "tests.workers.sharded_step", "tests.workers.sharded_experts", "tests.workers.sharded_context",
    "tests.workers.saving", "tests.workers.soak", "tests.workers.preparing",
    # Modules that are otherwise imported at first use.
    "s3fs", "torchao.quantization", "torch._dynamo.backends.distributed", "torch._dynamo.backends.inductor",
    "torch._dynamo.backends.cudagraphs",
    "torch._dynamo.backends.onnxrt", "torch._dynamo.backends.tensorrt", "torch._dynamo.backends.torchxla",
    "torch._dynamo.backends.tvm", "torch.export._trace", "torch.fx.experimental.validator",
    "torch._subclasses.schema_check_mode", "torch.profiler._cupti_monitor", "torch.utils.serialization.config",
    "tyro._backends._argparse_formatter", "tyro.constructors._struct_spec_dataclass",
)  # fmt: skip


@dataclass(frozen=True)
class RunRequest:
    """Request for new ranks; the reply is (exit status, output)."""

    processes: int
    function: str
    arguments: tuple[Any, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = str(ROOT)


# Client side: the tests


@contextlib.contextmanager
def zygote() -> Iterator[None]:
    """Run a zygote in this context; the environment variable `ADDRESS` has the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="zygote-") as folder:
        os.environ[ADDRESS] = address = f"{folder}/socket"
        command = [sys.executable, "-m", "tests.support.zygote", address]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE) as process:
            try:
                yield
            finally:
                assert process.stdin is not None
                process.stdin.close()  # the zygote ends when its standard input closes
                del os.environ[ADDRESS]


def connect() -> Connection:
    """Connect to the session's zygote."""
    client = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            client.connect(os.environ[ADDRESS])
            return Connection(client.detach())
        except (FileNotFoundError, ConnectionRefusedError):  # the zygote is still starting
            assert time.monotonic() < deadline, "the zygote does not answer"
            time.sleep(0.05)


def receive(connection: Connection) -> Any:
    """Return the reply to a request.

    Raises:
        TimeoutError: after `TIMEOUT` seconds.
    """
    if not connection.poll(TIMEOUT):
        connection.close()  # ends the ranks
        raise TimeoutError(f"the ranks did not end within {TIMEOUT} s")
    return connection.recv()


def run(processes: int, function: str, *arguments: Any, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run new ranks; return the exit status and the output."""
    with connect() as connection:
        connection.send(RunRequest(processes, function, arguments, {**os.environ, **(environment or {})}))
        reply: tuple[int, str] = receive(connection)
        return reply


def call(processes: int, function: str, *arguments: Any) -> Any:
    """Call `function(*arguments)` on new ranks of a gloo process group; return rank 0's result.

    Raises:
        AssertionError: with the output, if a rank fails.
    """
    with tempfile.NamedTemporaryFile() as file:
        status, output = run(processes, "tests.support.zygote:answer", file.name, function, arguments)
        assert status == 0, f"status {status} of {function}{arguments}\n{output[-10000:]}"
        return pickle.load(file)


# Server side: the zygote


def serve(address: str) -> None:
    """Answer connections until the standard input closes."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        from memdlm_dist.runtime import cpu

        cpu.prepare()
        for name in IMPORTS:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # garbage collections of the ranks then skip the imported objects
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [], 1.0)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in ready:
                return
            if server not in ready:
                continue
            client, _ = server.accept()
            if not os.fork():
                server.close()
                _answer(Connection(client.detach()))
            client.close()


def _answer(connection: Connection) -> None:
    """Serve one connection in this forked process, and exit."""
    status = 0
    try:
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), connection:
            request = connection.recv()
            os.environ.clear()
            os.environ.update(request.environment)
            os.chdir(request.folder)
            connection.send(_run(request, connection))
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def _function(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _print_to(file: Any) -> None:
    """Redirect this process's standard output and error to a file."""
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)


def _run(request: RunRequest, connection: Connection) -> tuple[int, str]:
    with tempfile.TemporaryFile() as output:

        def body(rank: int) -> int:
            connection.close()
            _print_to(output)
            status: int = _function(request.function)(rank, *request.arguments)
            return status

        status = ranks.wait(ranks.start(request.processes, body), connection.fileno())
        output.seek(0)
        return status, output.read().decode(errors="replace")


def answer(rank: int, path: str, function: str, arguments: tuple[Any, ...]) -> int:
    """Call a function in a gloo process group; rank 0 pickles the result to a file."""
    result = ranks.in_group(lambda: _function(function)(*arguments))
    if rank == 0:
        Path(path).write_bytes(pickle.dumps(result))
    return 0


if __name__ == "__main__":
    # Requests are pickled with classes of tests.support.zygote, but this module is named __main__: import it by name.
    importlib.import_module("tests.support.zygote").serve(sys.argv[1])
    os._exit(0)  # skips the clean-up, which would report frozen objects as leaks
