r"""Evaluation of a checkpoint with the lm-evaluation-harness: its flags, its tasks.

    python -m memdlm_dist.evaluation.harness --model_args config=CONFIG,memory=on --tasks ruler_cwe --batch_size 8 \
        --metadata '{"max_seq_lengths": [2048]}'

`--model memdlm` is the default. RULER's tasks measure lengths with the run's tokenizer, unless --metadata names
another. Runs under torchrun too, with the layout of the configuration. Requires the package's [eval] extra.
"""

import sys
from collections.abc import Sequence

import torch.distributed as dist

from memdlm_dist.runtime import cpu
from memdlm_dist.runtime.entry_point import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness; return the exit status.

    Args:
        argv: the harness's command line; `sys.argv` if None.
    """
    cpu.prepare()
    from memdlm_dist.evaluation.harness_command import run  # after `cpu.prepare`: it imports torchtitan

    try:
        return guarded(lambda: run(sys.argv[1:] if argv is None else argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
