"""Entry point of training, under torchrun (see launch/train.sh) or as a single process.

python -m memdlm_dist.train --job.config_file FILE [--section.key value ...]
"""

import os
import sys
import time
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.evaluation.task_validator import read_tasks
from memdlm_dist.runtime import preemption
from memdlm_dist.runtime.logs import start_logging
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.training.run import run


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line configures; return the exit status (docs/reliability.md)."""
    start_logging()
    try:
        return run(sys.argv[1:] if argv is None else argv, read_tasks)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # Most user errors occur on all ranks. Rank 0 prints them, and the launcher stops the other ranks while they
            # sleep. An error of this rank alone reaches torchrun through its error file; other launchers have none.
            time.sleep(3)
            get_error_handler().record_exception(error)
            if "TORCHELASTIC_ERROR_FILE" not in os.environ:
                print(f"error on local rank {os.environ['LOCAL_RANK']}: {error}", file=sys.stderr, flush=True)
        return EXIT_STATUS
    except KeyboardInterrupt:
        if is_rank_0():
            print("Interrupted: progress since the last checkpoint is lost.", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    preemption.ignore_outside_of_training()
    sys.exit(main())
