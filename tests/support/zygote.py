"""Zygote: a process that has imported all heavy modules and forks the ranks of the test runs.

Importing torch, torchtitan, streaming and the tokenizers takes seconds; a few steps of a small model take less than one
second. The pytest session starts one zygote for all pytest-xdist workers. The zygote has a single thread and never uses
autograd or a process group itself. For each connection to its socket it forks a server, which forks ranks for two kinds
of requests:

    RunRequest   new ranks call `function(rank, *arguments)`, which returns an exit status
    PoolRequest  ranks initialise a gloo process group once and then answer calls of `function(*arguments)`

Functions are named "module:function"; arguments and results are pickled.
"""

import contextlib
import gc
import importlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
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
    "tests.workers.saving", "tests.workers.soak",
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


@dataclass(frozen=True)
class PoolRequest:
    """Request for a pool of ranks; the reply to each call is (all ranks succeeded, rank 0's result or the error)."""

    processes: int
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


class RankPool:
    """Pool of gloo ranks that stay alive between calls; a failed call ends them, and the next call starts new ranks."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._connection: Connection | None = None

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function on all ranks; return rank 0's result.

        Raises:
            AssertionError: with the traceback, if a rank fails.
        """
        if self._connection is None:
            self._connection = connect()
            self._connection.send(PoolRequest(self.processes, dict(os.environ)))
        self._connection.send((function, arguments))
        succeeded = False
        try:
            succeeded, result = receive(self._connection)
        finally:
            if not succeeded:
                self.close()
        assert succeeded, result
        return result

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


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
            if isinstance(request, RunRequest):
                connection.send(_run(request, connection))
            else:
                _serve_pool(request, connection)
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


def _serve_pool(request: PoolRequest, connection: Connection) -> None:
    pipes = [Pipe() for _ in range(request.processes)]
    with tempfile.TemporaryFile() as output:

        def body(rank: int) -> int:
            connection.close()
            for number, (ours, theirs) in enumerate(pipes):
                ours.close()
                if number != rank:
                    theirs.close()
            _print_to(output)
            _answer_calls(pipes[rank][1])
            return 0

        children = ranks.start(request.processes, body)
        for _, theirs in pipes:
            theirs.close()
        try:
            while True:
                call = connection.recv()
                for ours, _ in pipes:
                    ours.send(call)
                succeeded, result = _collect([ours for ours, _ in pipes])
                if not succeeded:
                    output.seek(0)
                    result = f"{result}\n{output.read().decode(errors='replace')[-10000:]}"
                connection.send((succeeded, result))
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, 9)


def _collect(pipes: list[Connection]) -> tuple[bool, Any]:
    """Wait for the answers of all ranks or the first failure; return success, and rank 0's result or the error."""
    waiting, result = dict(zip(pipes, range(len(pipes)), strict=True)), None
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [])
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, answer = pipe.recv()
            except (EOFError, ConnectionResetError):
                succeeded, answer = False, "ended without an answer"
            if not succeeded:
                return False, f"rank {rank}: {answer}"
            if rank == 0:
                result = answer
    return True, result


def _answer_calls(pipe: Connection) -> None:
    """Answer calls in one process group until the pipe closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send((True, _function(function)(*arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
                raise


if __name__ == "__main__":
    # Requests are pickled with classes of tests.support.zygote, but this module is named __main__: import it by name.
    importlib.import_module("tests.support.zygote").serve(sys.argv[1])
    os._exit(0)  # skips the clean-up, which would report frozen objects as leaks
