"""What rank 0 alone looks up, prints or does, and how failures are told, in one line."""

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.compat.torch import storage_error
from memdlm_dist.errors import UserError


def is_first() -> bool:
    """Return whether this process is the one that prints and writes; known before the process group is."""
    return os.environ.get("RANK", "0") == "0"


_CHECKPOINTS = "The checkpoints cannot be accessed ({}); see the store."


def from_rank_0(action: Any, failing: str = _CHECKPOINTS) -> Any:
    """Run an action on rank 0; returns its result on all ranks, and raises its error on all.

    Args:
        failing: the sentence for an error that is not a UserError, with a place for it.
    """
    outcome: list[Any] = [None]
    if is_first():
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


def first_reason(reason: str) -> tuple[str, bool]:
    """Return the reason of the first rank that has one, empty if none has, and whether all have one.

    Args:
        reason: of this rank; empty if nothing failed.
    """
    if not dist.is_initialized():
        return reason, bool(reason)
    reasons = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    found = [(rank, text) for rank, text in enumerate(reasons) if text]
    if not found:
        return "", False
    rank, text = found[0]
    return text if text.startswith("rank ") else f"rank {rank}: {text}", len(found) == len(reasons)


class _Failed:
    def __init__(self, error: UserError):
        self.error = error


def failure_reason(failure: BaseException) -> str:
    """Return the first rank's reason, in one line.

    Raises:
        KeyboardInterrupt, SystemExit: if that is what it was. DCP catches them, and the run would go on.
    """
    if isinstance(failure, CheckpointException) and failure.failures:
        for error, _ in failure.failures.values():
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise type(error)(*error.args) from None
        rank, (error, _) = next(iter(failure.failures.items()))
        return f"rank {rank}: {_described(error)}"
    return _described(failure)


def _described(error: BaseException) -> str:
    """Return an error's message, with its class unless the message alone says what is wrong with a file."""
    known = isinstance(error, OSError | CheckpointException | UserError) or storage_error(str(error)) != str(error)
    return one_line(error) if known or not str(error) else f"{type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """Return an error's message without its full stop, or its name if it has none."""
    text = str(error).strip().splitlines()
    return storage_error(text[0]).rstrip(".") if text else type(error).__name__
