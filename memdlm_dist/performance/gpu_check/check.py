"""Loop of the check: runs the sections in order, each with a time limit, and writes the report after each one."""

import contextlib
import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError
from memdlm_dist.performance.gpu_check import gpu_report, processes, results
from memdlm_dist.performance.gpu_check.results import FAILED, OK, SKIPPED, TIMED_OUT, Result
from memdlm_dist.performance.gpu_check.section import Context, Failure, Section, Skip
from memdlm_dist.performance.gpu_check.sections import QUICK, SECTIONS

ROOT = Path(__file__).parents[3]
# Time limits in seconds: of a section; with --quick, of a section and of the whole call.
LIMIT, QUICK_LIMIT, QUICK_BUDGET = 480.0, 240.0, 600.0
_DEBUG_LEAST = 5.0  # a section with debug sizes does not start with fewer seconds left


@dataclass(frozen=True)
class CheckOptions:
    """Options of one call of the check."""

    output: Path
    command: str  # as the user typed it
    only: Sequence[str] = ()
    limit: float = LIMIT  # seconds of a section
    budget: float = math.inf  # seconds of the whole call
    quick: bool = False
    debug: bool = False  # run debug sizes; always the case without an accelerator


def probe(log: Path) -> dict[str, Any]:
    """Run environment.py in a child process and return its description of this machine.

    Raises:
        UserError: if torch or the package cannot be imported, or the devices do not answer.
    """
    command = [sys.executable, "-m", "memdlm_dist.performance.gpu_check.environment"]
    try:
        status, output = processes.run(command, log, 120.0, ROOT)
    except processes.TimeLimit:
        raise UserError(f"The devices did not answer within 120 s; read {log} and try nvidia-smi.") from None
    json_lines = [line for line in output.splitlines() if line.startswith("{")]
    if status != 0 or not json_lines:
        raise UserError(f"The devices and versions cannot be looked up; read {log}.")
    environment: dict[str, Any] = json.loads(json_lines[-1])
    return environment


def check(
    request: CheckOptions,
    sections: Sequence[Section] = SECTIONS,
    look_up: Callable[[Path], dict[str, Any]] = probe,
) -> int:
    """Run sections and write report.md; return 0 if all sections that ran passed, else 1.

    Args:
        request: options of this call.
        sections: all sections, in their order.
        look_up: function that takes a log file and returns the machine's description.

    Raises:
        UserError: if a section is unknown, the output folder cannot be written, or the machine cannot be looked up.
        KeyboardInterrupt: On Ctrl-C, SIGTERM or SIGHUP, after the report has been written.
    """
    deadline = time.monotonic() + request.budget
    chosen = _chosen(request, sections)
    log = request.output / "logs/environment.log"
    with _written(request.output):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
    interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if not interrupted:  # a second signal must not interrupt the clean-up after the first
            interrupted = True
            raise KeyboardInterrupt

    with processes.on_interrupt(interrupt):
        environment = look_up(log)
        machine = _machine(environment["devices"], request.debug)
        print(f"{machine}, torch {environment['packages']['torch']}", flush=True)
        statuses = []
        for number, section in enumerate(chosen, start=1):
            heading = f"[{number}/{len(chosen)}] {section.name}"
            with _written(request.output):
                result = _result(section, request, environment, deadline, heading)
                results.keep(request.output, result)
                gpu_report.write(request.output, machine, request.command, sections)
            figure = section.headline(result.numbers) if result.status == OK else result.reason
            print(f"{heading}: {result.status} after {result.seconds:.0f} s: {figure}", flush=True)
            statuses.append(result.status)
            if result.reason == _INTERRUPTED:
                break
        print(f"Report: {request.output / 'report.md'}", flush=True)
    if result.reason == _INTERRUPTED:
        raise KeyboardInterrupt
    return int(FAILED in statuses or TIMED_OUT in statuses)


_INTERRUPTED = "interrupted"


@contextlib.contextmanager
def _written(output: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the output folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}); make room or choose another --output.") from None


def _result(
    section: Section, request: CheckOptions, environment: dict[str, Any], deadline: float, heading: str
) -> Result:
    """Run a section, or skip it if it needs a device or more time; return its result.

    Args:
        deadline: end of the whole call on the clock time.monotonic().
        heading: start of the section's line on the console.
    """
    log = request.output / f"logs/{section.name}.log"
    if section.name != "environment":  # its log holds the output of `probe`
        log.unlink(missing_ok=True)
    debug = request.debug or not environment["devices"]
    left = deadline - time.monotonic()
    limit = min(request.limit, left)
    context = Context(ROOT, request.output, log, environment, debug, request.quick, time.monotonic() + limit)
    result = Result(
        section.name,
        machine=_machine(environment["devices"], request.debug),
        torch=environment["packages"]["torch"],
        date=datetime.now().isoformat(" ", "seconds"),
        seconds=0.0,
        status=SKIPPED,
        quick=request.quick,
        commands=context.commands,
        numbers=context.numbers,
    )
    if section.needs_device and not environment["devices"]:
        result.reason = "needs an accelerator, and torch finds none here"
    elif left < (min(section.least, _DEBUG_LEAST) if debug else section.least):
        result.reason = f"{max(left, 0.0):.0f} s of the budget were left"
    else:
        print(f"{heading} (at most {limit:.0f} s) ...", flush=True)
        _run(section, context, result, limit, cut=left < request.limit)
    return result


def _run(section: Section, context: Context, result: Result, limit: float, cut: bool) -> None:
    """Run a section and set its result's status, reason and seconds.

    Args:
        limit: seconds that the section may take.
        cut: whether `limit` comes from the budget and not from the section's own limit.
    """
    began = time.monotonic()
    try:
        section.run(context)
        result.status = OK
    except Skip as why:
        result.reason = str(why)
    except Failure as why:
        result.status, result.reason = FAILED, str(why)
    except processes.TimeLimit:
        # A section that the budget cuts has not failed.
        result.status = SKIPPED if cut else TIMED_OUT
        result.reason = f"cut by the budget at {limit:.0f} s" if cut else f"ended at {limit:.0f} s, its limit"
    except KeyboardInterrupt:
        result.status, result.reason = FAILED, _INTERRUPTED
    except Exception as error:  # the next section must run after any failure of this one
        _unexpected(error, context, result)
    try:
        section.headline(result.numbers)
    except Exception as error:  # the numbers that a command wrote are malformed
        _unexpected(error, context, result)
        result.numbers.clear()
    result.seconds = time.monotonic() - began


def _unexpected(error: Exception, context: Context, result: Result) -> None:
    """Mark a result as failed and append the traceback to the section's log."""
    result.status, result.reason = FAILED, f"{type(error).__name__}: {error}"
    with context.log.open("a") as log:
        traceback.print_exception(error, file=log)


def _chosen(request: CheckOptions, sections: Sequence[Section]) -> list[Section]:
    """Return the requested sections in their order; always includes `environment`."""
    names = [section.name for section in sections]
    for name in request.only:
        if name not in names:
            raise UserError(f"There is no section {name!r}; choose among {', '.join(names)}.")
    requested = request.only or (QUICK if request.quick else names)
    return [section for section in sections if section.name in {"environment", *requested}]


def _machine(devices: Sequence[dict[str, Any]], debug: bool) -> str:
    """Return the machine's name, under which its results are kept; debug sizes have a separate name."""
    if not devices:
        return f"CPU{gpu_report.DEBUG}"
    return f"{len(devices)} x {devices[0]['name']}{gpu_report.DEBUG if debug else ''}"


def command_line(argv: Sequence[str]) -> str:
    """Return the shell command of a call with the arguments `argv`."""
    return shlex.join(["bash", "launch/gpu_check.sh", *argv])
