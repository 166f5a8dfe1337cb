"""torchrun with two changes: it forwards stop signals to the workers, and does not repeat errors already explained.

After SIGTERM torchrun gives its workers 30 seconds, and it prints a traceback for every failure. This launcher
forwards SIGTERM and SIGUSR1 to the workers, which finish their step and save, however long that takes. Exit statuses:

    0    the run is complete
    2    a user error, or a fault that one sentence explains
    75   stopped by a signal and saved: start it again to continue
    128+n  stopped at once by a second signal n
    1    a process was killed, or an unexpected error: see the tracebacks
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from memdlm_dist.compat.torchrun import AgentLog, shutdown_flags
from memdlm_dist.errors import EXIT_STATUS as USER_ERROR
from memdlm_dist.runtime.preemption import EXIT_STATUS as PREEMPTED
from memdlm_dist.runtime.preemption import ONE_REQUEST_SECONDS, STATUS_FILE
from memdlm_dist.runtime.process_environment import set_process_environment

# Environment variable that gives the workers the name of their job. A restarted job keeps its name.
JOB = "MEMDLM_JOB"


def job_name(endpoint: str, rendezvous: str) -> str:
    """Return the job's name: from Slurm, else from a non-local rendezvous endpoint, else from this host and process."""
    if batch := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {batch}"
    if endpoint and not endpoint.startswith("localhost"):
        return f"{endpoint}/{rendezvous}"
    return f"{socket.gethostname()}/{os.getpid()}"


class SignalForwarder:
    """Handler that forwards the first SIGTERM or SIGUSR1 to the workers and kills them at the second."""

    def __init__(self) -> None:
        self._first: float | None = None

    def install(self) -> None:
        """Install the signal handlers; call in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self._first is None:
            self._first = time.monotonic()
            if not _workers():
                sys.exit(PREEMPTED)  # no worker has started
            threading.Thread(target=self._forward, args=(signal.Signals(number),), daemon=True).start()
        elif time.monotonic() - self._first > ONE_REQUEST_SECONDS:
            for worker in _workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            os._exit(128 + number)

    @staticmethod
    def _forward(number: signal.Signals) -> None:
        # The signal would kill a worker that is still importing: wait until the worker has installed its handler.
        waiting = set(_workers())
        while waiting:
            for worker in sorted(waiting):
                has_handler = _has_handler(worker, signal.SIGUSR1)
                if has_handler:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, number)
                if has_handler is not False:
                    waiting.discard(worker)
            time.sleep(0.1)


def _workers() -> list[int]:
    """Return the process ids of the workers: child processes whose environment has LOCAL_RANK."""
    child_ids = []
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            child_ids += [int(child) for child in children.read_text().split()]
    return [child for child in child_ids if b"\0LOCAL_RANK=" in b"\0" + _read(child, "environ")]


def _has_handler(process: int, number: int) -> bool | None:
    """Return whether a process handles signal `number`; None if the process has ended."""
    for line in _read(process, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return None


def _read(process: int, name: str) -> bytes:
    """Read /proc/`process`/`name`; empty if the process has ended."""
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _explain(failures: list[ProcessFailure], by_agent: set[int]) -> int | None:
    """Print why the workers failed, one sentence each.

    Args:
        failures: failed workers, as torchrun reports them.
        by_agent: process ids that torchrun's agent killed after another worker had failed.

    Returns:
        The launcher's exit status, or None if the failure needs a traceback.
    """
    user_errors = [process for process in failures if process.exitcode == USER_ERROR]
    # After a failure the agent kills the remaining workers: they are not the cause.
    killed = [process for process in failures if process.exitcode < 0 and process.pid not in by_agent]
    if len(killed) < len(failures):
        killed = [process for process in killed if process.exitcode != -signal.SIGTERM]
    for process in killed:
        name = signal.Signals(-process.exitcode).name
        hint = " (often the machine is out of memory)" if name == "SIGKILL" else ""
        print(f"error: local rank {process.local_rank} was ended by {name}{hint}.", file=sys.stderr)
    # Local rank 0 has printed its error on the console; the output of other ranks does not reach the console.
    if user_errors and all(process.local_rank for process in user_errors):
        message = user_errors[0].message
        sentence = message["message"] if isinstance(message, dict) else message
        print(
            f"error on local rank {user_errors[0].local_rank}: {sentence.removeprefix('UserError: ')}", file=sys.stderr
        )
    if killed:
        return 1
    return USER_ERROR if user_errors else None


def main() -> int:
    """Launch the workers as torchrun does; return the exit status."""
    agent = AgentLog(explained=USER_ERROR)
    logging.getLogger(AgentLog.NAME).addFilter(agent)
    # torchrun handles the keyboard's and the terminal's signals only. Workers that remain after a failure wait for the
    # failed rank in vain, so they get 5 seconds before they are killed.
    flags = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *shutdown_flags(run.get_args_parser(), seconds=5)]
    arguments = run.parse_args([*flags, *sys.argv[1:]])
    # Workers share the rendezvous store by default. A restart would read the previous start's connection keys, so
    # workers that may restart open a store of their own. Its port is chosen long before the workers listen on it, and
    # another process may take it meanwhile; the shared store has no such gap.
    if arguments.max_restarts:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    set_process_environment(run.determine_local_world_size(arguments.nproc_per_node))
    os.environ.setdefault(JOB, job_name(arguments.rdzv_endpoint, arguments.rdzv_id))
    SignalForwarder().install()
    with tempfile.NamedTemporaryFile("r", prefix="memdlm-status-") as status:
        os.environ[STATUS_FILE] = status.name
        try:
            run.run(arguments)
        except ChildFailedError as failure:
            explained = _explain(list(failure.failures.values()), agent.killed)
            if explained is None:
                raise
            return explained
        except RendezvousError as error:
            reason = str(error) or type(error).__name__
            print(
                f"error: The rendezvous of the nodes at {arguments.rdzv_endpoint} failed or was lost ({reason}); "
                "start all nodes with the same NNODES, RDZV_ENDPOINT and RDZV_ID.",
                file=sys.stderr,
            )
            return 1
        return int(status.read() or 0)


if __name__ == "__main__":
    sys.exit(main())
