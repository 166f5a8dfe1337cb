"""Command-line arguments of the memory at inference."""

import argparse
from collections.abc import Sequence
from typing import get_args

from memdlm_dist.errors import UserError
from memdlm_dist.inference.predictor import MEMORY_WEIGHTS
from memdlm_dist.inference.prompt_memory import ANCHOR_RATIO, MemorySettings, Refresh, Start
from memdlm_dist.method.diffusion import WEIGHTS
from memdlm_dist.runtime.entry_point import positive


def add_memory_arguments(p: argparse.ArgumentParser, decodes: bool) -> argparse._ArgumentGroup:
    """Add the group "memory" to a parser; return the group.

    Args:
        decodes: the tool decodes responses, before whose blocks the memory can be refreshed.
    """
    g = p.add_argument_group("memory")
    g.add_argument(
        "--anchor-ratio",
        type=float,
        default=ANCHOR_RATIO,
        metavar="R",
        help=f"share of the prompt's tokens that are masked in the memory's anchor (default: {ANCHOR_RATIO})",
    )
    g.add_argument(
        "--memory-weights",
        choices=WEIGHTS,
        default=MEMORY_WEIGHTS,
        help="loss weights of the inner steps on the prompt: those of the run's noise schedule at each state's mask "
        f"ratio, as in training (schedule), or 1 (uniform) (default: {MEMORY_WEIGHTS})",
    )
    g.add_argument(
        "--memory-chunk",
        type=positive,
        metavar="TOKENS",
        help="let the inner loop read the prompt in pieces of at most this many tokens, one after another, for prompts "
        "longer than those of the training; not in the paper (default: the whole prompt at once)",
    )
    if decodes:
        g.add_argument(
            "--memory-refresh",
            choices=get_args(Refresh),
            default="none",
            help="run the inner loop again before each further block of the response, on the prompt and the decoded "
            "tokens (block); not in the paper (default: none)",
        )
        g.add_argument(
            "--memory-from",
            choices=get_args(Start),
            default="fresh",
            help="fast weights with which --memory-refresh starts: new ones, or the present ones (default: fresh)",
        )
    return g


def flags_of(settings: MemorySettings) -> list[str]:
    """Return the flags of a memory's settings that differ from the published ones, and would go unread without it."""
    return ["--memory-chunk"] * (settings.chunk is not None) + ["--memory-refresh"] * (settings.refresh != "none")


def check_memory_is_on(flags: Sequence[str]) -> None:
    """Refuse flags that need a memory, where the memory is off.

    Raises:
        UserError: if there is any flag.
    """
    if flags:
        raise UserError(f"{flags[0]} needs a memory of the prompt; add --memory on, or omit {flags[0]}.")


def get_memory(options: argparse.Namespace) -> MemorySettings:
    """Return the settings of the memory of the parsed arguments.

    Raises:
        UserError: if a value is out of range.
    """
    return MemorySettings(
        options.anchor_ratio,
        options.memory_chunk,
        getattr(options, "memory_refresh", "none"),
        getattr(options, "memory_from", "fresh"),
    )
