#!/usr/bin/env python
"""Check a machine with accelerators, and write down what it does: outputs/gpu_check/report.md.

    bash launch/gpu_check.sh [options]
    bash launch/gpu_check.sh --quick
    bash launch/gpu_check.sh --only bench_8b lora_8b --budget 900

Sections run in the order of --list, the most valuable first, each with a time limit; one that fails does not stop the
next. The report keeps the results of earlier calls. Without an accelerator debug sizes run on the CPU, which checks the
flow alone. Exit status 1 if a section failed or took too long, 130 if interrupted.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from memdlm_dist.performance.gpu_check.check import (
    LIMIT,
    QUICK_BUDGET,
    QUICK_LIMIT,
    ROOT,
    CheckOptions,
    check,
    command_line,
)
from memdlm_dist.performance.gpu_check.sections import QUICK, SECTIONS
from memdlm_dist.runtime.entry_point import guarded, new_parser, positive


def parser() -> argparse.ArgumentParser:
    p = new_parser("gpu_check.py", __doc__)
    p.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="run these sections alone")
    p.add_argument(
        "--budget", type=positive, metavar="SECONDS",
        help=f"for the whole call: what does not fit is skipped (default: none; {QUICK_BUDGET:.0f} with --quick)",
    )  # fmt: skip
    p.add_argument(
        "--quick", action="store_true",
        help=f"fewer rounds and sizes, of {', '.join(QUICK)} unless --only says others, and at most "
             f"{QUICK_LIMIT:.0f} s a section (otherwise {LIMIT:.0f})",
    )  # fmt: skip
    p.add_argument("--debug", action="store_true", help="debug sizes on an accelerator, to try the flow")
    p.add_argument(
        "--output", type=Path, default=ROOT / "outputs/gpu_check", metavar="DIR",
        help="folder of report, results and logs (default: outputs/gpu_check of the repository)",
    )  # fmt: skip
    p.add_argument("--list", action="store_true", help="list the sections and end")
    return p


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    if options.list:
        for section in SECTIONS:
            print(f"{section.name:<12} {section.purpose}")
        return 0
    return check(
        CheckOptions(
            output=options.output.absolute(),
            command=command_line(argv),
            only=options.only,
            limit=QUICK_LIMIT if options.quick else LIMIT,
            budget=options.budget or (QUICK_BUDGET if options.quick else math.inf),
            quick=options.quick,
            debug=options.debug,
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    return guarded(lambda: run(options, argv))


if __name__ == "__main__":
    sys.exit(main())
