#!/usr/bin/env python
r"""Run a study, which trains a recipe with different settings and seeds, and compare the results pairwise by seed.

Examples:
  python tools/study.py run launch/memory_study.toml --output outputs/study --arms plain,set_1 --seeds 0
  python tools/study.py report docs/results/study.json --arms plain,set_1 --seeds 1,2,3,4,5

`study.py COMMAND --help` describes a command and its options.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.study import arms, run_queue, study_report, study_results
from memdlm_dist.runtime.device import has_accelerator
from memdlm_dist.runtime.entry_point import add_command, guarded, new_parser, positive
from memdlm_dist.runtime.preemption import exiting_on_sigterm
from memdlm_dist.runtime.process_environment import available_cores, set_process_environment
from memdlm_dist.runtime.writer import claimed, this_process

_RUN = """Train and evaluate every chosen arm with every chosen seed, and collect the results in one file.

Example:
  python tools/study.py run launch/memory_study.toml --output outputs/study --arms plain,set_1 --seeds 0

A run has the folder DIR/ARM-SEED; its log is study.log there. Runs that are complete are kept, so the command goes on
where it was interrupted; an interrupted training starts again. Every run is one process. Seeds are the outer loop: an
interrupted study has whole pairs. After every run the results of all runs in DIR are written to DIR/study.json.
"""
_REPORT = """Show the results of a study: losses, needle tasks and exposure bias by arm, and paired differences.

Example:
  python tools/study.py report docs/results/study.json --arms plain,set_1 --seeds 1,2,3,4,5 --comparisons 3

A paired difference is a run's result minus that of the arm it is compared with, at the same seed. Its interval is
Student's t interval of the mean over the seeds, at the confidence 1 - (1 - P) / N for N comparisons (Bonferroni).
"""


def numbers(text: str) -> list[int]:
    """Parse comma-separated seeds (argparse type)."""
    seeds = [int(item) for item in text.split(",")]
    if min(seeds) < 0:
        raise ValueError
    return list(dict.fromkeys(seeds))


def names(text: str) -> list[str]:
    """Parse comma-separated names (argparse type)."""
    return [name for name in text.split(",") if name]


def confidence(text: str) -> float:
    """Parse a confidence between 0 and 1 (argparse type)."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser with its subcommands."""
    p = new_parser("study.py", __doc__)
    p.usage = "study.py {run,report} ... [options]"
    commands = p.add_subparsers(title="commands", dest="command", required=True, prog="study.py", metavar="COMMAND")
    run, show = add_command(commands, "run", _RUN), add_command(commands, "report", _REPORT)
    run.usage = "study.py run STUDY --output DIR [options]"
    show.usage = "study.py report RESULTS [options]"
    chosen = run.add_argument_group("runs")
    chosen.add_argument("study", type=Path, metavar="STUDY", help="TOML file of the study (docs/study.md)")
    chosen.add_argument("--arms", type=names, metavar="A,B", help="comma-separated arms to run (default: all)")
    chosen.add_argument(
        "--seeds", type=numbers, default=[0], metavar="N,M", help="comma-separated seeds (default: only 0)"
    )
    chosen.add_argument("--evaluations", type=names, metavar="A,B",
                        help="comma-separated evaluations of every trained model; '' for none (default: all)"
                        )  # fmt: skip
    execution = run.add_argument_group("execution")
    execution.add_argument("--workers", type=positive, metavar="N",
                           help="number of runs at a time (default: one per accelerator, or per CPU core)"
                           )  # fmt: skip
    execution.add_argument("--dry-run", action="store_true", help="list what is missing, and start nothing")
    execution.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the runs and their results"
    )
    chosen = show.add_argument_group("runs")
    chosen.add_argument("results", type=Path, metavar="RESULTS", help="study.json that `run` has written")
    chosen.add_argument("--arms", type=names, metavar="A,B", help="comma-separated arms to show (default: all)")
    chosen.add_argument("--seeds", type=numbers, metavar="N,M", help="comma-separated seeds to show (default: all)")
    chosen.add_argument("--evaluations", type=names, metavar="A,B",
                        help="comma-separated evaluations to show; '' for none (default: all)")  # fmt: skip
    comparison = show.add_argument_group("comparison")
    comparison.add_argument("--against", metavar="ARM", help="arm to compare with (default: that of the study file)")
    comparison.add_argument("--confidence", type=confidence, default=0.95, metavar="P",
                            help="confidence of the intervals before the correction (default: 0.95)")  # fmt: skip
    comparison.add_argument("--comparisons", type=positive, default=1, metavar="N",
                            help="number of comparisons that the intervals are corrected for (default: 1)"
                            )  # fmt: skip
    output = show.add_argument_group("output")
    output.add_argument("--plots", type=Path, metavar="DIR", help="folder for plots (default: no plots)")
    return p


def run_study(options: argparse.Namespace) -> int:
    """Run what is missing, collect the results and return the exit status, 1 if a run failed.

    Raises:
        UserError: if the study file or a name is wrong, an arm cannot run, or a folder holds a run with other settings.
    """
    study = arms.read(options.study)
    evaluations = study.select("evaluations", options.evaluations)
    chosen = study.select("arms", options.arms)
    runs = [run_queue.Run(arm, seed) for seed in options.seeds for arm in chosen]
    run_queue.check(study, runs, evaluations)
    left = run_queue.missing(study, runs, options.output, evaluations)
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them complete", flush=True)
    if options.dry_run:
        for run, steps in left.items():
            print(f"{run}: {', '.join(steps)}")
        return 0
    report.check_output(options.output, overwrite=False)
    devices = _devices()
    workers = options.workers or len(devices) or available_cores()
    set_process_environment(workers)
    path = options.output / study_results.RESULTS
    began, finished = time.perf_counter(), 0

    def warn(sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr)

    def progress(run: run_queue.Run, seconds: float, succeeded: bool) -> None:
        nonlocal finished
        finished += 1
        minutes = (time.perf_counter() - began) / finished * (len(left) - finished) / 60
        folder = options.output / str(run)
        result = study_results.headline(folder) if succeeded else _failure(folder / run_queue.LOG)
        study_results.collect(study, options.output, path, lambda sentence: None)
        print(f"[{finished}/{len(left)}] {run}: {result} ({seconds:.0f} s, {minutes:.0f} minutes left)", flush=True)

    with claimed(str(options.output), this_process()):
        failed = run_queue.execute(study, left, options.output, workers, devices, progress)
        count = study_results.collect(study, options.output, path, warn)
    print(f"{count} runs written to {path}")
    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(map(str, failed))}.", file=sys.stderr)
    return int(bool(failed))


def _failure(log: Path) -> str:
    """Return the last line of a failed run's log, and the log's path."""
    return f"failed: {run_queue.last_line(log)}; see {log}"


def _devices() -> list[str]:
    """Return the accelerators of this process, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.accelerator.device_count() if has_accelerator() else 0
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def show_report(options: argparse.Namespace) -> int:
    """Print the tables, write the plots and return the exit status.

    Raises:
        UserError: if the results cannot be read, or an arm is unknown.
    """
    study = study_results.read(options.results).select(
        options.arms, options.seeds, options.against, options.evaluations
    )
    level = 1 - (1 - options.confidence) / options.comparisons
    print(study_report.tables(study, level))
    if options.plots:
        report.check_output(options.plots, overwrite=True)
        for path in study_report.plots(study, options.plots, level):
            print(f"written to {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(argv)
    if options.command == "report":
        return guarded(lambda: show_report(options))
    with exiting_on_sigterm("complete runs are kept, and the same command goes on from there"):
        return guarded(lambda: run_study(options))


if __name__ == "__main__":
    sys.exit(main())
