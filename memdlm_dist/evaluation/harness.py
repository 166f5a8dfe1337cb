"""The lm-evaluation-harness on a checkpoint, with the harness's own flags and tasks.

    python -m memdlm_dist.evaluation.harness --model_args config=CONFIG,memory=on --tasks ruler_cwe --batch_size 8 \\
        --metadata '{"max_seq_lengths": [2048]}'

`--model memdlm` is the default. The tokenizer by which RULER's tasks are measured is the run's own, if none is named.
Works under torchrun, with the layout of the configuration. Needs the package's [eval] extra.
"""

import sys
from collections.abc import Sequence

import torch.distributed as dist

from memdlm_dist.runtime import cpu
from memdlm_dist.runtime.entry_point import guarded


def main(argv: Sequence[str] | None = None) -> int:
    cpu.prepare()
    from memdlm_dist.evaluation.harness_command import run  # only now: it imports torchtitan

    try:
        return guarded(lambda: run(sys.argv[1:] if argv is None else argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
