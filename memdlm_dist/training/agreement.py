"""What all ranks agree on in every step, before the optimizer moves: one small collective, read once."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.errors import UserError

logger = logging.getLogger()


class StepAgreement:
    """Collects what this rank knows of a step: its losses, its gradients, and whether it was asked to stop.

    Reading it is one wait for the device a step. torchtitan waits once a step itself, when it counts the tokens.

    Args:
        model_parts: whose gradients count.
        config: the [reliability] section.
        device: of the collective.
    """

    def __init__(self, model_parts: list[torch.nn.Module], config: Any, device: torch.device):
        self._parameters = [p for part in model_parts for p in part.parameters()]
        self._config, self._device = config, device
        self.skipped = 0  # of the whole run
        self._in_a_row = 0
        self.start_step()

    def start_step(self) -> None:
        self._losses: list[tuple[Tensor, Tensor]] = []

    def record(self, loss: Tensor, sample_ids_B: Tensor) -> None:
        """A micro-batch's share of the loss, and its samples."""
        self._losses.append((loss.detach(), sample_ids_B))

    def reach(self, stop_requested: bool) -> tuple[bool, str]:
        """Call on all ranks, when the step's gradients are there.

        Returns:
            Whether any rank was asked to stop; and what is not finite on any of them, empty if all is.
        """
        flags = torch.stack([self._finite().logical_not(), torch.tensor(stop_requested, device=self._device)]).float()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        not_finite, stop = flags.tolist()
        if not not_finite:
            self._in_a_row = 0
        return bool(stop), self._describe() if not_finite else ""

    def _finite(self) -> Tensor:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        norm = torch.nn.utils.get_total_norm(local)
        return torch.isfinite(torch.stack([loss for loss, _ in self._losses])).all() & torch.isfinite(norm)

    def _describe(self) -> str:
        """The losses that are not finite, of all ranks, and their samples."""
        ours = [(loss.item(), ids.tolist()) for loss, ids in self._losses if not torch.isfinite(loss)]
        theirs: list[list[tuple[float, list[int]]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(theirs, ours)
        found = [pair for pairs in theirs for pair in pairs]
        if not found:
            return "the gradient is not finite, though the loss is"
        samples = sorted({sample for _, ids in found for sample in ids})
        shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
        return f"the loss is {found[0][0]} on samples among {shown}"

    def skip(self, step: int, wrong: str) -> None:
        """Count a batch that must not change anything.

        Raises:
            UserError: if the configuration says to stop, or too many came in a row.
        """
        if self._config.on_nonfinite == "stop":
            raise UserError(
                f"Step {step} cannot be taken: {wrong}; look at the data and the learning rates, or set "
                "reliability.on_nonfinite = 'skip' to leave such batches out."
            )
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row >= self._config.max_consecutive_skips:
            raise UserError(
                f"Step {step} is the last of {self._in_a_row} in a row that cannot be taken: {wrong}; go back to an "
                "earlier checkpoint (checkpoint.load_step) and lower the learning rates."
            )
        logger.warning(f"Skipping the batch of step {step}: {wrong}. Skipped so far: {self.skipped}.")
