"""The common shape of the commands: arguments beside a configuration's, quiet logs, one sentence for a mistake."""

import argparse
import io
import logging
import math
import sys
from collections.abc import Callable, Sequence

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.runtime.logs import start_logging
from memdlm_dist.runtime.rank_0 import is_first


def positive(text: str) -> int:
    """Parse a positive integer, as an argument's type."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def positive_number(text: str) -> float:
    """Parse a positive finite number, as an argument's type."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, description: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help shows `description`; the parent's help lists its first line."""
    return commands.add_parser(
        name,
        help=description.split("\n", 1)[0],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command's own arguments; returns the configuration's, --section.key value, beside them."""
    options, rest = parser.parse_known_args(argv)
    expects_value = False
    for argument in rest:
        if argument.startswith("--"):
            if "." not in argument:
                parser.error(f"unknown argument {argument} (keys of the configuration are written --section.key)")
            expects_value = "=" not in argument
        elif not expects_value:
            parser.error(f"unexpected argument {argument}")
        else:
            expects_value = False
    return options, rest


def quiet() -> None:
    """Leave out log lines but errors, and keep standard output for what the command makes."""
    start_logging()
    logging.getLogger().setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def guarded(main: Callable[[], int]) -> int:
    """Run a command; returns its exit status. A user's mistake is one sentence on the first rank."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what is printed may quote any text
    try:
        return main()
    except UserError as mistake:
        if is_first():
            print(f"error: {mistake}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        return 130
