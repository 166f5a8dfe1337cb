"""Command-line arguments of needle tasks, shared by corpus generation and evaluation."""

import argparse
from dataclasses import fields

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.needle import TASKS, Sizes


def integers(text: str) -> list[int]:
    """Parse comma-separated positive integers (argparse type).

    Raises:
        ValueError: if an item is not a positive integer.
    """
    numbers = [int(item) for item in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def add_needle_arguments(p: argparse.ArgumentParser) -> None:
    """Add --tasks, --lengths, --seed, --haystack and one argument for each field of `Sizes`."""
    p.add_argument(
        "--tasks", default=",".join(TASKS), metavar="A,B", help=f"tasks, comma-separated (default: {','.join(TASKS)})"
    )
    p.add_argument("--lengths", type=integers, required=True, metavar="N,M", help="tokens of prompt and response")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    p.add_argument("--haystack", nargs="+", default=[], metavar="FILE",
                   help="text to hide facts in (default: the Python documentation's reference topics)")  # fmt: skip
    sizes = p.add_argument_group("sizes", "sizes of the tasks; RULER's by default")
    for field in fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        sizes.add_argument(name, type=int, default=field.default, metavar="N", help=f"default: {field.default}")


def get_tasks(options: argparse.Namespace) -> list[str]:
    """Return the tasks of --tasks.

    Raises:
        UserError: if a task is unknown.
    """
    chosen: list[str] = options.tasks.split(",")
    for task in chosen:
        if task not in TASKS:
            raise UserError(f"There is no needle task {task!r}; choose among {', '.join(TASKS)}.")
    return chosen


def get_sizes(options: argparse.Namespace) -> Sizes:
    """Return the sizes that the arguments give.

    Raises:
        UserError: if a size is too small.
    """
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    for field in fields(Sizes):
        minimum = 0 if field.name == "distractors" else 1
        if getattr(sizes, field.name) < minimum:
            raise UserError(f"--{field.name.replace('_', '-')} must be at least {minimum}.")
    return sizes
