"""torchrun 2.11 to 2.13: a flag that some versions lack, and events that only the agent's log reports.

Imports no heavy modules: the launcher must handle signals soon after its start.
"""

import argparse
import logging


def shutdown_flags(parser: argparse.ArgumentParser, seconds: int) -> list[str]:
    """Return the flag that limits how long workers may take to exit after another worker failed; 2.11 has none."""
    flag = "--shutdown-timeout"
    return [f"{flag}={seconds}"] if flag in parser.format_help() else []


class AgentLog(logging.Filter):
    """Filter of the log of torchrun's agent, the only place that names the workers it killed (2.13).

    Drops the agent's report of a worker with the exit status `explained`: the worker has explained that status itself.

    Attributes:
        killed: process ids of the workers that the agent killed.
    """

    NAME = "torch.distributed.elastic.multiprocessing.api"

    def __init__(self, explained: int) -> None:
        super().__init__()
        self.killed: set[int] = set()
        self._dropped = f"exitcode: {explained})"

    def filter(self, record: logging.LogRecord) -> bool:
        """Record killed workers; return False for a report that is dropped."""
        if str(record.msg).startswith("Unable to shutdown process") and isinstance(record.args, tuple):
            self.killed |= {pid for pid in record.args if isinstance(pid, int)}
        return self._dropped not in record.getMessage()
