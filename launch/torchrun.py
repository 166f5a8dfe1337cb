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
        mistakes = [process for process in failure.failures.values() if process.exitcode == USER_ERROR]
        if not mistakes:
            raise
        # Local rank 0 says it on the console itself; the others are not shown there.
        if all(process.local_rank for process in mistakes):
            message = mistakes[0].message
            sentence = message["message"] if isinstance(message, dict) else message
            sentence = sentence.removeprefix("UserError: ")
            print(f"error on local rank {mistakes[0].local_rank}: {sentence}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
