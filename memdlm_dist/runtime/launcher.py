"""torchrun, with signals passed on to the training processes, and quiet about what they have already explained.

torchrun answers SIGTERM by giving its workers 30 seconds, and every failure with a traceback of its own. Here SIGTERM
and SIGUSR1 reach the workers, which finish their step and save, for as long as that takes. Exit statuses:

    0    the run is complete
    2    a mistake, or a fault that one sentence explains
    75   stopped by a signal and saved: start it again to go on
    128+n  stopped at once by a second signal n
    1    a process was killed, or anything else: then tracebacks say what
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

# The training processes read here which job they are of: a job that is started again keeps its name.
JOB = "MEMDLM_JOB"


def job_name(endpoint: str, rendezvous: str) -> str:
    """Name this job: by the batch system, by a rendezvous that was named, or by this process."""
    if batch := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {batch}"
    if endpoint and not endpoint.startswith("localhost"):
        return f"{endpoint}/{rendezvous}"
    return f"{socket.gethostname()}/{os.getpid()}"


class SignalForwarder:
    """Passes SIGTERM and SIGUSR1 on to the workers; at the second, ends all at once."""

    def __init__(self) -> None:
        self._first: float | None = None

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self._first is None:
            self._first = time.monotonic()
            if not _workers():
                sys.exit(PREEMPTED)  # nothing has begun
            threading.Thread(target=self._forward, args=(signal.Signals(number),), daemon=True).start()
        elif time.monotonic() - self._first > ONE_REQUEST_SECONDS:
            for worker in _workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            os._exit(128 + number)

    @staticmethod
    def _forward(number: signal.Signals) -> None:
        # A worker that is still importing would be ended by the signal: wait until it has its handler.
        waiting = set(_workers())
        while waiting:
            for worker in sorted(waiting):
                caught = _handles(worker, signal.SIGUSR1)
                if caught:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, number)
                if caught is not False:
                    waiting.discard(worker)
            time.sleep(0.1)


def _workers() -> list[int]:
    """The training processes: children of ours that have a rank."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in children.read_text().split()]
    return [child for child in found if b"\0LOCAL_RANK=" in b"\0" + _read(child, "environ")]


def _handles(process: int, number: int) -> bool | None:
    """Whether a process has a handler for a signal; None if it is gone."""
    for line in _read(process, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return None


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _explain(failures: list[ProcessFailure], by_agent: set[int]) -> int | None:
    """Say what the workers ended of; the exit status, or None if only a traceback can say more."""
    mistakes = [process for process in failures if process.exitcode == USER_ERROR]
    # The agent itself ends those that remain.
    killed = [process for process in failures if process.exitcode < 0 and process.pid not in by_agent]
    if len(killed) < len(failures):
        killed = [process for process in killed if process.exitcode != -signal.SIGTERM]
    for process in killed:
        name = signal.Signals(-process.exitcode).name
        hint = " (a machine that runs out of memory does that)" if name == "SIGKILL" else ""
        print(f"error: local rank {process.local_rank} was ended by {name}{hint}.", file=sys.stderr)
    # Local rank 0 says it on the console itself; the others are not shown there.
    if mistakes and all(process.local_rank for process in mistakes):
        message = mistakes[0].message
        sentence = message["message"] if isinstance(message, dict) else message
        print(f"error on local rank {mistakes[0].local_rank}: {sentence.removeprefix('UserError: ')}", file=sys.stderr)
    if killed:
        return 1
    return USER_ERROR if mistakes else None


def main() -> int:
    agent = AgentLog(explained=USER_ERROR)
    logging.getLogger(AgentLog.NAME).addFilter(agent)
    # torchrun's own handlers keep to the keyboard. Workers that remain when another one has failed wait for it in
    # vain: they get 5 seconds.
    flags = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *shutdown_flags(run.get_args_parser(), seconds=5)]
    arguments = run.parse_args([*flags, *sys.argv[1:]])
    # With the rendezvous' store shared, as is the default, a restart reads the connection keys of the start before.
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
                f"error: The nodes did not come together, or lost the one at {arguments.rdzv_endpoint} ({reason}); "
                "start all of them with the same NNODES, RDZV_ENDPOINT and RDZV_ID.",
                file=sys.stderr,
            )
            return 1
        return int(status.read() or 0)


if __name__ == "__main__":
    sys.exit(main())
