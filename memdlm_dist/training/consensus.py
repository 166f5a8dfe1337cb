"""Per-step consensus: non-finite check and stop request in one all-reduce, before the optimizer moves."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer

from memdlm_dist.compat.torch import skip_if_flagged, supports_skip_flag
from memdlm_dist.config.job_config import Reliability
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.transfer import HostCopy

logger = logging.getLogger()


class _PendingFlags(NamedTuple):
    """A step whose flags the host has not read, and what names the cause if they say that it is not finite."""

    step: int
    flags: Tensor  # float32 [2], 0 or 1 over all ranks: not finite, asked to stop
    arriving: HostCopy | None  # None: they are read at once
    losses: Sequence[Tensor]
    sample_ids: Sequence[Tensor]


class StepConsensus:
    """What all ranks agree on: whether a step's losses and gradients are finite, and whether any was asked to stop.

    Fused optimizers leave a step out on the device if it is not finite; the host reads the flags when the next step
    reaches its own, or when `settle` is called, and has nothing to wait for then. For other optimizers, and for those
    of a model that lies elsewhere (offloaded to the CPU), it reads them at once, and waits for the device.

    Args:
        model_parts: whose gradients count.
        optimizers: which take the step.
        device: of the collective.
    """

    def __init__(
        self,
        model_parts: Sequence[torch.nn.Module],
        optimizers: OptimizersContainer,
        config: Reliability,
        device: torch.device,
    ):
        self._parameters = dict(pair for part in model_parts for pair in part.named_parameters())
        self._optimizers, self._config, self._device = optimizers, config, device
        self.skipped = 0  # batches, of the whole run
        self.stop = False  # a rank was asked to
        self.broken_weight = ""  # one that is not finite, so that no step can be taken
        self._in_a_row = 0
        self._asked: _PendingFlags | None = None

    def reduce(self, step: int, losses: Sequence[Tensor], sample_ids: Sequence[Tensor], stop_requested: bool) -> None:
        """Reduce over all ranks; call when the step's gradients are there. Settles the step before.

        Args:
            losses: this rank's, of each micro-batch.
            sample_ids: `[B]` of each micro-batch, on the host.

        Raises:
            UserError: see `settle`.
        """
        self.finish()
        finite = torch.isfinite(torch.stack(list(losses))).all() & torch.isfinite(self._local_norm())
        asked_to_stop = torch.full((), float(stop_requested), device=self._device)
        flags = torch.stack([finite.logical_not().float(), asked_to_stop])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        late = all(supports_skip_flag(optimizer, flags.device) for optimizer in self._optimizers)
        self._asked = _PendingFlags(step, flags, HostCopy(flags) if late else None, losses, sample_ids)

    def step_optimizers(self) -> None:
        """Take the step, which changes neither weights nor optimizer state if it is not finite.

        Raises:
            UserError: see `settle`.
        """
        assert self._asked is not None, "the ranks have not agreed"
        if self._asked.arriving is not None:
            with skip_if_flagged(self._optimizers, self._asked.flags[0]):
                self._optimizers.step()
            return
        skipped = self.skipped
        self.finish()
        if self.skipped > skipped:
            # Parameters without a gradient are left alone, and their optimizer state too.
            self._optimizers.zero_grad(set_to_none=True)
        self._optimizers.step()

    def finish(self) -> None:
        """Act on the flags of the last step, if that has not been done: count its batch if it was skipped, set `stop`.

        Raises:
            UserError: if its batch is not finite and may not be skipped, if too many were in a row, or if a weight is
                not finite.
        """
        if (asked := self._asked) is None:
            return
        self._asked = None
        flags = asked.flags if asked.arriving is None else asked.arriving.read()
        not_finite, stop = flags.tolist()
        self.stop = self.stop or bool(stop)
        if not_finite:
            self._skip(asked.step, self._describe(asked.losses, asked.sample_ids))
        else:
            self._in_a_row = 0

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

    def _skip(self, step: int, wrong: str) -> None:
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
