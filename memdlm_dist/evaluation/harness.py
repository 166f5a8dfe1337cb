"""The lm-evaluation-harness on a checkpoint, with the harness's own flags and tasks.

    python -m memdlm_dist.evaluation.harness --model_args config=CONFIG,memory=on --tasks ruler_cwe --batch_size 8 \\
        --metadata '{"max_seq_lengths": [2048]}'

`--model memdlm` is the default. The tokenizer by which RULER's tasks are measured is the run's own, if none is named.
Works under torchrun, with the layout of the configuration. Needs the package's [eval] extra.
"""

import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.runtime import cpu


def main(argv: Sequence[str] | None = None) -> int:
    cpu.prepare()
    from memdlm_dist.evaluation.harness_command import run  # only now: it imports torchtitan

    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as mistake:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {mistake}", file=sys.stderr)
        return EXIT_STATUS
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
