"""Helpers that all commands share: argument parsing, quiet logs, one-sentence errors and exit statuses."""

import argparse
import io
import logging
import math
import sys
from collections.abc import Callable, Sequence

from memdlm_dist.errors import EXIT_STATUS, UserError
from memdlm_dist.runtime.logs import start_logging
from memdlm_dist.runtime.rank_0 import is_rank_0


def positive(text: str) -> int:
    """Parse a positive integer (argparse type).

    Raises:
        ValueError: if the text is not a positive integer.
    """
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def positive_number(text: str) -> float:
    """Parse a positive finite number (argparse type).

    Raises:
        ValueError: if the text is not a positive finite number.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def new_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Create an argument parser whose help keeps the line breaks of `description`."""
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
    """Parse a command's arguments and separate the configuration overrides.

    Exits with a usage error if an argument is neither known to `parser` nor an override.

    Returns:
        The parsed options, and the overrides as written: --section.key value or --section.key=value.
    """
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
    """Log errors only, to standard error; standard output is for the command's results."""
    start_logging()
    logging.getLogger().setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def guarded(main: Callable[[], int]) -> int:
    """Run a command; a UserError becomes one sentence on rank 0.

    Returns:
        The exit status of `main`, `EXIT_STATUS` after a UserError, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # messages may quote any text
    try:
        return main()
    except UserError as error:
        if is_rank_0():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        return 130
