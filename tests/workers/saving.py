"""Asynchronous save of one rank while its job gets stop signals."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from memdlm_dist.checkpoint.saver import Saver
from memdlm_dist.compat import torch as seam
from memdlm_dist.runtime import preemption
from memdlm_dist.runtime.preemption import StopRequest
from memdlm_dist.runtime.single_process import free_port


class WaitingWriter(dcp.FileSystemWriter):
    """Writer that waits for a file "go" next to the checkpoint folder."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        Path(self.path, "writing").touch()
        until(Path(self.path).with_name("go").exists)
        return super().write_data(*args, **kwargs)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_saver() -> tuple[Saver, Any]:
    """Start a saver as DCP does; return it and its process."""
    group = SimpleNamespace(
        local_rank=0, global_rank=0, world_size=1, tcp_store_master_addr="127.0.0.1",
        tcp_store_master_port=free_port(), use_prefix_store=False, disable_automatic_gc=False, disable_manual_gc=False,
    )  # fmt: skip
    saver = Saver(pg_init_info=group)
    return saver, saver._save_process


def signal_from_elsewhere(process: int, *numbers: int) -> None:
    """Send signals to a process from a process that is not its parent."""
    child = os.fork()
    if not child:
        for number in numbers:
            os.kill(process, number)
        os._exit(0)
    os.waitpid(child, 0)


def signalled(rank: int, folder: str) -> int:
    """Signal a saver twice during its save, like a batch system; end another one, like its rank."""
    # Fork instead of spawn, because importing torch takes seconds; both start with signals blocked.
    executor = seam._async_process_executor
    fork = executor.mp.get_context("fork")
    executor.mp = SimpleNamespace(get_context=lambda method: fork)
    preemption.ONE_REQUEST_SECONDS = 0.3
    with StopRequest():
        saver, process = start_saver()
        target = Path(folder, "step-1")
        saving = {"state_dict": {"x": torch.arange(3.0)}, "storage_writer": WaitingWriter(target)}
        thread = threading.Thread(target=lambda: saver.save(saving.pop("state_dict"), **saving))
        thread.start()
        until((target / "writing").exists)
        signal_from_elsewhere(process.pid, signal.SIGTERM, signal.SIGUSR1)  # count as one request
        time.sleep(0.05)
        assert process.is_alive(), f"the saver ended with {process.exitcode}"
        target.with_name("go").touch()
        thread.join()
        assert (target / ".metadata").exists()
        time.sleep(0.3)
        signal_from_elsewhere(process.pid, signal.SIGTERM)  # the second request
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM

        saver, process = start_saver()
        executor._CHECKPOINT_PROCESS = saver
        seam.end_saver()
        assert process.exitcode == 128 + signal.SIGTERM and executor._CHECKPOINT_PROCESS is None
    return 0
