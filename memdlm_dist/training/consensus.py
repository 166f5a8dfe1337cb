"""Per-step consensus: non-finite check and stop request in one all-reduce, before the optimizer step."""

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
    """Flags of a step that the host has not read yet, and the losses and samples that an error message names."""

    step: int
    flags: Tensor  # float32 [2], reduced over all ranks, 1 if set: (non-finite, stop requested)
    host_copy: HostCopy | None  # asynchronous copy of the flags; None if the host reads them in the same step
    losses: Sequence[Tensor]
    sample_ids: Sequence[Tensor]


class StepConsensus:
    """Per-step consensus of all ranks: a non-finite flag and a stop flag in one all-reduce.

    A fused optimizer reads the non-finite flag on the device and skips the step there. The host reads both flags in
    the next step's `reduce`, when their copy has usually arrived, or earlier in `finish`. With any other optimizer, or
    with parameters offloaded to the CPU, the host reads the flags in the same step and waits for the device.

    Args:
        model_parts: modules whose gradients are checked.
        optimizers: optimizers that take or skip the step.
        config: the [reliability] section.
        device: device of the all-reduce.
        buffers: what the optimizers' hooks change besides the parameters, such as experts' biases.
    """

    def __init__(
        self,
        model_parts: Sequence[torch.nn.Module],
        optimizers: OptimizersContainer,
        config: Reliability,
        device: torch.device,
        buffers: Sequence[Tensor] = (),
    ):
        self._buffers = buffers
        self._parameters = dict(pair for part in model_parts for pair in part.named_parameters())
        self._optimizers, self._config, self._device = optimizers, config, device
        self.skipped = 0  # batches skipped in the whole run
        self.stop = False  # a rank has received a stop request
        self.nonfinite_weight = ""  # name of a weight that is not finite: the run cannot continue
        self._consecutive_skips = 0
        self._pending: _PendingFlags | None = None

    def reduce(self, step: int, losses: Sequence[Tensor], sample_ids: Sequence[Tensor], stop_requested: bool) -> None:
        """Finish the previous step, then all-reduce the flags of this one; call after its backward passes.

        Args:
            losses: this rank's loss of each micro-batch.
            sample_ids: sample ids of each micro-batch, `[B]` on the host.
            stop_requested: this rank has received a stop request.

        Raises:
            UserError: see `finish`.
        """
        self.finish()
        finite = torch.isfinite(torch.stack(list(losses))).all() & torch.isfinite(self._local_norm())
        stop_flag = torch.full((), float(stop_requested), device=self._device)
        flags = torch.stack([finite.logical_not().float(), stop_flag])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        deferred = all(supports_skip_flag(optimizer, flags.device) for optimizer in self._optimizers)
        self._pending = _PendingFlags(step, flags, HostCopy(flags) if deferred else None, losses, sample_ids)

    def step_optimizers(self) -> None:
        """Step the optimizers; a non-finite step changes neither weights nor optimizer state.

        Raises:
            UserError: see `finish`.
        """
        assert self._pending is not None, "reduce() must come first"
        is_skipped, before = self._pending.flags[0].bool(), [x.clone() for x in self._buffers]
        if self._pending.host_copy is not None:
            with skip_if_flagged(self._optimizers, self._pending.flags[0]):
                self._optimizers.step()
        else:
            skipped = self.skipped
            self.finish()
            if self.skipped > skipped:
                # An optimizer changes neither a parameter that has no gradient nor its optimizer state.
                self._optimizers.zero_grad(set_to_none=True)
            self._optimizers.step()
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(is_skipped, old, buffer))

    def finish(self) -> None:
        """Read the flags of the last step if they are still unread: count a skipped batch, set `stop`.

        Raises:
            UserError: if the step is not finite and skipping is off, if too many steps in a row were skipped, or if a
                weight is not finite.
        """
        if (pending := self._pending) is None:
            return
        self._pending = None
        flags = pending.flags if pending.host_copy is None else pending.host_copy.read()
        nonfinite, stop = flags.tolist()
        self.stop = self.stop or bool(stop)
        if nonfinite:
            self._skip(pending.step, self._describe(pending.losses, pending.sample_ids))
        else:
            self._consecutive_skips = 0

    def _local_norm(self) -> Tensor:
        """Return the norm of this rank's gradient shards; it is finite only if all of them are."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm([_local(g) for g in gradients])

    def _describe(self, losses: Sequence[Tensor], sample_ids: Sequence[Tensor]) -> str:
        """Return the cause as a clause: a non-finite weight of any rank, else a non-finite loss and its samples."""
        pairs = zip(losses, sample_ids, strict=True)
        local = [(loss.item(), ids.tolist()) for loss, ids in pairs if not torch.isfinite(loss)]
        weight = next((name for name, p in self._parameters.items() if not _local(p).isfinite().all()), "")
        gathered: list[tuple[str, list[tuple[float, list[int]]]]] = [("", [])] * dist.get_world_size()
        dist.all_gather_object(gathered, (weight, local))
        self.nonfinite_weight = next((name for name, _ in gathered if name), "")
        if self.nonfinite_weight:
            return f"the weights themselves are not finite ({self.nonfinite_weight})"
        nonfinite = [pair for _, pairs in gathered for pair in pairs]
        if not nonfinite:
            return "the gradient is not finite, though the loss is"
        samples = sorted({sample for _, ids in nonfinite for sample in ids})
        shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
        return f"the loss is {nonfinite[0][0]} on at least one of samples {shown}"

    def _skip(self, step: int, cause: str) -> None:
        """Count and log a skipped batch.

        Raises:
            UserError: if a weight is not finite, if `reliability.on_nonfinite` is 'stop', or after
                `reliability.max_consecutive_skips` skipped batches in a row.
        """
        if self.nonfinite_weight:
            raise UserError(
                f"Step {step} cannot be taken: {cause}; start from other weights (checkpoint.initial_load_path), or go "
                "back to an earlier checkpoint (checkpoint.load_step)."
            )
        if self._config.on_nonfinite == "stop":
            raise UserError(
                f"Step {step} cannot be taken: {cause}; look at the data and the learning rates, or set "
                "reliability.on_nonfinite = 'skip' to leave such batches out."
            )
        self.skipped, self._consecutive_skips = self.skipped + 1, self._consecutive_skips + 1
        if self._consecutive_skips >= self._config.max_consecutive_skips:
            raise UserError(
                f"Step {step} is the last of {self._consecutive_skips} steps in a row that cannot be taken: {cause}; "
                "go back to an earlier checkpoint (checkpoint.load_step) and lower the learning rates."
            )
        logger.warning(f"Skipping the batch of step {step}: {cause}. Skipped so far: {self.skipped}.")


def _local(x: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; return any other tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x
