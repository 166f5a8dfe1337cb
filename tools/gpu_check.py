#!/usr/bin/env python
"""Check a machine with accelerators: measure speed, run tests and short trainings, and write report.md.

Examples:
  bash launch/gpu_check.sh
  bash launch/gpu_check.sh --quick
  bash launch/gpu_check.sh --only bench_8b lora_8b --budget 900

Sections run in the order of --list, the most valuable first, each with a time limit. If a section fails, the next one
still runs. The report, outputs/gpu_check/report.md by default, keeps the results of earlier calls. Without an
accelerator debug sizes run on the CPU, which tests the check itself and measures nothing. Exit status: 0 if all
sections that ran passed, 1 if a section failed or exceeded its time limit, 130 if interrupted.
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
    """Return the command's parser."""
    p = new_parser("gpu_check.py", __doc__)
    p.usage = "gpu_check.sh [--quick] [--only SECTION ...] [options]"
    selection = p.add_argument_group("selection")
    selection.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION", help="sections to run (default: all of --list)"
    )
    selection.add_argument(
        "--quick", action="store_true",
        help=f"run fewer rounds and sizes, at most {QUICK_LIMIT:.0f} s a section instead of {LIMIT:.0f}; unless --only "
             f"is given, run only the sections {', '.join(QUICK)}",
    )  # fmt: skip
    selection.add_argument("--list", action="store_true", help="list the sections and exit")
    hardware = p.add_argument_group("hardware")
    hardware.add_argument(
        "--budget", type=positive, metavar="SECONDS",
        help="time limit of the whole call in seconds; sections that do not fit are skipped (default: none, or "
             f"{QUICK_BUDGET:.0f} with --quick)",
    )  # fmt: skip
    hardware.add_argument(
        "--debug", action="store_true", help="run debug sizes on an accelerator, to test the check itself"
    )
    output = p.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, default=ROOT / "outputs/gpu_check", metavar="DIR",
        help="folder for report, results and logs (default: outputs/gpu_check in the repository)",
    )  # fmt: skip
    return p


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """List the sections or run the check; return the exit status."""
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
    """Run the command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    return guarded(lambda: run(options, argv))


if __name__ == "__main__":
    sys.exit(main())
