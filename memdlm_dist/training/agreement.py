"""Per-step consensus: non-finite check and stop request in one all-reduce, before the optimizer moves."""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.config.job_config import Reliability
from memdlm_dist.errors import UserError

logger = logging.getLogger()


class StepAgreement:
    """What all ranks agree on: whether a step's losses and gradients are finite, and whether any was asked to stop.

    Reading it is one wait for the device a step. torchtitan waits once a step itself, when it counts the tokens.

    Args:
        model_parts: whose gradients count.
        device: of the collective.
    """

    def __init__(self, model_parts: Sequence[torch.nn.Module], config: Reliability, device: torch.device):
        self._parameters = dict(pair for part in model_parts for pair in part.named_parameters())
        self._config, self._device = config, device
        self.skipped = 0  # of the whole run
        self.broken_weight = ""  # one that is not finite, so that no step can be taken
        self._in_a_row = 0

    def reach(self, losses: Sequence[Tensor], sample_ids: Sequence[Tensor], stop_requested: bool) -> tuple[bool, str]:
        """Reduce over all ranks; call when the step's gradients are there.

        Args:
            losses: this rank's, of each micro-batch.
            sample_ids: `[B]` of each micro-batch.

        Returns:
            Whether any rank was asked to stop; and what is not finite on any of them, empty if all is.
        """
        finite = torch.isfinite(torch.stack(list(losses))).all() & torch.isfinite(self._local_norm())
        flags = torch.stack([finite.logical_not(), torch.tensor(stop_requested, device=self._device)]).float()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        not_finite, stop = flags.tolist()
        if not not_finite:
            self._in_a_row = 0
        return bool(stop), self._describe(losses, sample_ids) if not_finite else ""

    def _local_norm(self) -> Tensor:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm([_local(g) for g in gradients])

    def _describe(self, losses: Sequence[Tensor], sample_ids: Sequence[Tensor]) -> str:
        """Name the weights that are not finite, of all ranks; or else the losses, and their samples."""
        pairs = zip(losses, sample_ids, strict=True)
        ours = [(loss.item(), ids.tolist()) for loss, ids in pairs if not torch.isfinite(loss)]
        weight = next((name for name, p in self._parameters.items() if not _local(p).isfinite().all()), "")
        theirs: list[tuple[str, list[tuple[float, list[int]]]]] = [("", [])] * dist.get_world_size()
        dist.all_gather_object(theirs, (weight, ours))
        self.broken_weight = next((name for name, _ in theirs if name), "")
        if self.broken_weight:
            return f"the weights themselves are not finite ({self.broken_weight})"
        found = [pair for _, pairs in theirs for pair in pairs]
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
        if self.broken_weight:
            raise UserError(
                f"Step {step} cannot be taken: {wrong}; start from other weights (checkpoint.initial_load_path), or go "
                "back to an earlier checkpoint (checkpoint.load_step)."
            )
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


def _local(x: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x
