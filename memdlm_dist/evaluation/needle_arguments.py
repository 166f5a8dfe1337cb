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


_SIZES_HELP = {
    "values": "multi_value: numbers of the requested key",
    "distractors": "multi_value: numbers of other keys",
    "digits": "multi_value and variable_tracking: digits of a number",
    "hops": "variable_tracking: assignments from one variable to the next",
    "letters": "variable_tracking: letters of a variable's name",
    "common": "common_words: number of common words, which are the answer",
    "repeats": "common_words: occurrences of each common word",
    "rare_repeats": "common_words: occurrences of each other word",
    "facts": "facts_1 and facts_2: number of statements about people and things",
    "words": "repeat: number of words to repeat",
}


def add_needle_arguments(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the groups "tasks" and "sizes" to a parser; return "tasks"."""
    tasks = p.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks", default=",".join(TASKS), metavar="A,B", help=f"comma-separated tasks (default: {','.join(TASKS)})"
    )
    tasks.add_argument("--lengths", type=integers, required=True, metavar="N,M",
                       help="comma-separated lengths of prompt and response together, in tokens")  # fmt: skip
    tasks.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    tasks.add_argument("--haystack", nargs="+", default=[], metavar="FILE",
                       help="text files that hide the facts (default: the Python documentation's reference topics)"
                       )  # fmt: skip
    sizes = p.add_argument_group("sizes", "Size of each task; the defaults are RULER's.")
    for field in fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        sizes.add_argument(
            name,
            type=int,
            default=field.default,
            metavar="N",
            help=f"{_SIZES_HELP[field.name]} (default: {field.default})",
        )
    return tasks


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
        UserError: if a size is out of range.
    """
    return Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
