"""Actions that only rank 0 performs, failures that all ranks share, and one-line error messages."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.compat.torch import storage_error
from memdlm_dist.errors import UserError

logger = logging.getLogger()


def is_rank_0() -> bool:
    """Return whether this process is rank 0, which prints and writes; works before the process group is initialised."""
    return os.environ.get("RANK", "0") == "0"


_CHECKPOINTS = "The checkpoints cannot be accessed ({}); see the store."


def from_rank_0(action: Any, failing: str = _CHECKPOINTS) -> Any:
    """Run `action` on rank 0 and return its result on all ranks; a collective call.

    Args:
        failing: message for an error that is not a UserError, with {} for the error's text.

    Raises:
        UserError: on all ranks, if `action` fails on rank 0.
    """
    outcome: list[Any] = [None]
    if is_rank_0():
        try:
            outcome = [action()]
        except Exception as error:
            sentence = failing.format(f"{type(error).__name__}: {one_line(error)}")
            outcome = [_Failed(error if isinstance(error, UserError) else UserError(sentence))]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], _Failed):
        raise outcome[0].error
    return outcome[0]


def write_on_rank_0(action: Callable[[], object]) -> None:
    """Run an action that writes files on rank 0; a collective call.

    Raises:
        OSError: on all ranks, if `action` fails on rank 0.
    """
    try:
        from_rank_0(action, failing="{}")
    except UserError as error:
        raise OSError(one_line(error)) from None


def on_all_ranks(action: Callable[[], Any], task: str) -> Any:
    """Run an action on every rank, then compare the outcomes, and return this rank's result; a collective call.

    Args:
        task: what the action does, for the log of an unexpected failure, such as "Writing the file".

    Raises:
        OSError: on all ranks, if `action` fails on any rank.
    """
    reason, result = "", None
    try:
        result = action()
    except Exception as failure:  # the other ranks wait for this one
        reason = failure_reason(failure)
        log_unexpected(failure, task)
    reason, _ = first_reason(reason)
    if reason:
        raise OSError(reason)
    return result


def log_unexpected(failure: BaseException, task: str) -> None:
    """Log a failure with its traceback, unless it is an error that its message explains.

    Call it at once: other ranks may hang in a collective, and then no reasons are exchanged.
    """
    if not isinstance(failure, CheckpointException | OSError | UserError):
        logger.error(f"{task} failed on this rank: {failure_reason(failure)}.", exc_info=failure)


def first_reason(reason: str) -> tuple[str, bool]:
    """Return the failure of the lowest rank that failed, and whether all ranks failed; a collective call.

    Args:
        reason: this rank's failure; empty if it did not fail.

    Returns:
        The failure, or an empty string if no rank failed; True if all ranks failed.
    """
    if not dist.is_initialized():
        return reason, bool(reason)
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    failures = [(rank, text) for rank, text in enumerate(reasons) if text]
    if not failures:
        return "", False
    rank, text = failures[0]
    return text if text.startswith("rank ") else f"rank {rank}: {text}", len(failures) == len(reasons)


class _Failed:
    """Outcome of a failed action, as rank 0 broadcasts it."""

    def __init__(self, error: UserError):
        self.error = error


def failure_reason(failure: BaseException) -> str:
    """Return one line for a failure; for a DCP CheckpointException, the failure of the first rank that it lists.

    Raises:
        KeyboardInterrupt, SystemExit: if one of them ended a rank. DCP catches them, and the run would go on.
    """
    if isinstance(failure, CheckpointException) and failure.failures:
        for error, _ in failure.failures.values():
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise type(error)(*error.args) from None
        rank, (error, _) = next(iter(failure.failures.items()))
        return f"rank {rank}: {_described(error)}"
    return _described(failure)


def _described(error: BaseException) -> str:
    """Return an error's message, after its class name if the message alone may be unclear."""
    known = isinstance(error, OSError | CheckpointException | UserError) or storage_error(str(error)) != str(error)
    return one_line(error) if known or not str(error) else f"{type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or the class name if the message is empty."""
    text = str(error).strip().splitlines()
    return storage_error(text[0]).rstrip(".") if text else type(error).__name__
