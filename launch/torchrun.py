"""torchrun, but quiet about a mistake that the training program has already explained.

torchrun ends every failure with a traceback of its own. After an exit with the status that
memdlm_dist keeps for user errors, one sentence is on the screen and nothing is left to say.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

USER_ERROR = 2  # memdlm_dist.errors.EXIT_STATUS; not imported, for that would load torchtitan


class _NotOurs(logging.Filter):
    """Drops the agent's report of a process that ended with the user-error status."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"exitcode: {USER_ERROR})" not in record.getMessage()


def main() -> int:
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_NotOurs())
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as failure:
        codes = {process.exitcode for process in failure.failures.values()}
        if USER_ERROR in codes:
            return USER_ERROR
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
