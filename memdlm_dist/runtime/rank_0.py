"""What rank 0 alone looks up or does, and how failures are told, in one line."""

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from memdlm_dist.compat.torch import storage_error
from memdlm_dist.errors import UserError


def from_rank_0(action: Any) -> Any:
    """What rank 0 gets from an action, on all ranks; an error of it is raised on all."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except Exception as error:
            sentence = f"The checkpoints cannot be accessed ({type(error).__name__}: {one_line(error)}); see the store."
            outcome = [_Failed(error if isinstance(error, UserError) else UserError(sentence))]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], _Failed):
        raise outcome[0].error
    return outcome[0]


class _Failed:
    def __init__(self, error: UserError):
        self.error = error


def reason_of(failure: BaseException) -> str:
    """The first rank's reason, in one line."""
    if isinstance(failure, CheckpointException) and failure.failures:
        rank, (error, _) = next(iter(failure.failures.items()))
        return f"rank {rank}: {one_line(error)}"
    return one_line(failure)


def one_line(error: BaseException) -> str:
    """An error's message, or its name if it has none."""
    text = str(error).strip().splitlines()
    return storage_error(text[0]) if text else type(error).__name__
