"""The harness's command on the flavour `tiny`, which exists in tests alone; the arguments are the command's."""

import sys

import run_many  # noqa: F401  (the flavour)

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.evaluation.harness import main

if __name__ == "__main__":
    sys.exit(main())
