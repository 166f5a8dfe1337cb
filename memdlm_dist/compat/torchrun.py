"""torchrun 2.11 to 2.13: a flag that not every version has, and what its agent says in its log alone.

Light to import: the launcher must soon be ready for signals.
"""

import argparse
import logging


def shutdown_flags(parser: argparse.ArgumentParser, seconds: int) -> list[str]:
    """Return the flag for how long workers may take to end when another one has failed; torchrun 2.11 has none."""
    flag = "--shutdown-timeout"
    return [f"{flag}={seconds}"] if flag in parser.format_help() else []


class AgentLog(logging.Filter):
    """Reads the log of torchrun's agent, which has no other word on whom it killed (2.13).

    Drops its report of a process that ended with `explained`, a status that the process has explained itself.

    Attributes:
        killed: process ids of the workers that the agent ended.
    """

    NAME = "torch.distributed.elastic.multiprocessing.api"

    def __init__(self, explained: int) -> None:
        super().__init__()
        self.killed: set[int] = set()
        self._dropped = f"exitcode: {explained})"

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Unable to shutdown process") and isinstance(record.args, tuple):
            self.killed |= {pid for pid in record.args if isinstance(pid, int)}
        return self._dropped not in record.getMessage()
