"""The arguments that describe needle tasks, for those who make a corpus of them and those who ask about them."""

import argparse
from dataclasses import fields

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.needle import TASKS, Sizes


def integers(text: str) -> list[int]:
    """Comma-separated positive integers, as an argument's type."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def add_needle_arguments(p: argparse.ArgumentParser) -> None:
    """Tasks, lengths, seed, haystack and sizes."""
    p.add_argument(
        "--tasks", default=",".join(TASKS), metavar="A,B", help=f"tasks, comma-separated (default: {','.join(TASKS)})"
    )
    p.add_argument("--lengths", type=integers, required=True, metavar="N,M", help="tokens of prompt and response")
    p.add_argument("--seed", type=int, default=0, help="another one makes other samples (default: 0)")
    p.add_argument("--haystack", nargs="+", default=[], metavar="FILE",
                   help="text to hide facts in (default: the Python documentation's reference topics)")  # fmt: skip
    sizes = p.add_argument_group("sizes", "how much the tasks ask for; RULER's numbers by default")
    for field in fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        sizes.add_argument(name, type=int, default=field.default, metavar="N", help=f"default: {field.default}")


def get_tasks(options: argparse.Namespace) -> list[str]:
    """The chosen tasks.

    Raises:
        UserError: if there is no such task.
    """
    chosen: list[str] = options.tasks.split(",")
    for task in chosen:
        if task not in TASKS:
            raise UserError(f"There is no needle task {task!r}; choose among {', '.join(TASKS)}.")
    return chosen


def get_sizes(options: argparse.Namespace) -> Sizes:
    """The chosen sizes.

    Raises:
        UserError: if one of them is too small.
    """
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    for field in fields(Sizes):
        least = 0 if field.name == "distractors" else 1
        if getattr(sizes, field.name) < least:
            raise UserError(f"--{field.name.replace('_', '-')} must be at least {least}.")
    return sizes
