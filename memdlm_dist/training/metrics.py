"""Scalars of the objective and the memory, beside torchtitan's own, and the console line's share of them."""

import math

import torch
from torch import Tensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import dist_sum

from memdlm_dist.compat.torchtitan import appending_to_step_line
from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.method.inner_loop import InnerStatistics

INNER_LOSS = "parametric_memory/inner_loss_step_{}"
INNER_GRAD_NORM = "parametric_memory/inner_grad_norm_step_{}"
WRITTEN = "parametric_memory/fast_weight_norm"
SKIPPED = "parametric_memory/skipped_updates"
HARDWARE_FLOPS = "parametric_memory/hardware_flops_ratio"
MASK_RATIO = "diffusion/mask_ratio"
SKIPPED_BATCHES = "reliability/skipped_batches"
LARGEST_LOAD = "experts/largest_load"
UNUSED = "experts/unused"
LOAD_ENTROPY = "experts/load_entropy"


class MemDLMMetrics(MetricsProcessor):
    """torchtitan's processor, which also averages over micro-batches and data-parallel ranks what the
    trainer records during a step. The ranks of a context-parallel group record the same, but for losses and load.

    Recording stays on the device. Only `log_step` reduces and reads, on steps that log.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.totals: dict[str, float] = {}  # counts of the run, the same on every rank
        self.start_step()

    def start_step(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> [sum, number]
        self._rank_loss: Tensor | None = None  # [loss sum, maskable tokens] of this rank
        self._expert_load: Tensor | None = None

    def record(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add the entries of `values` for which `counted` holds (all by default) to a scalar's average."""
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
        self.record_ratio(name, torch.where(counted, values, 0.0).sum(), counted.sum())

    def record_ratio(self, name: str, total: Tensor, number: Tensor) -> None:
        """Add to the numerator and the denominator of a scalar."""
        pair = torch.stack([total.float(), number.float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def record_rank_loss(self, loss_sum: Tensor, maskable: Tensor) -> None:
        """Add a micro-batch's loss sum and its number of maskable tokens, for the largest loss of a rank."""
        pair = torch.stack([loss_sum.detach().float(), maskable.float()])
        self._rank_loss = pair if self._rank_loss is None else self._rank_loss + pair

    def record_inner_loop(self, statistics: InnerStatistics) -> None:
        """The averages are over sets of fast weights that had a scored token."""
        for k, counted_G in enumerate(statistics.counted_KG):
            self.record(INNER_LOSS.format(k + 1), statistics.loss_KG[k], counted_G)
            self.record(INNER_GRAD_NORM.format(k + 1), statistics.grad_norm_KG[k], counted_G)
        self.record(WRITTEN, statistics.written_norm_G, statistics.counted_KG.any(0))
        self.record(SKIPPED, statistics.skipped_KG.float().sum().unsqueeze(0))

    def record_expert_load(self, load_XE: Tensor) -> None:
        """The tokens of every expert of X layers since they were last logged, on this rank."""
        self._expert_load = load_XE

    def _load_balance(self) -> dict[str, float]:
        """How evenly the tokens of all ranks were spread over experts, averaged over layers."""
        if self._expert_load is None:
            return {}
        load_XE = self._expert_load.double()
        mesh = self.parallel_dims.get_optional_mesh("loss")
        if mesh is not None:
            torch.distributed.all_reduce(load_XE, group=mesh.get_group())
        share_XE = load_XE / load_XE.sum(1, keepdim=True).clamp(min=1)
        largest = share_XE.amax(1).mean() * share_XE.shape[1]
        unused = (load_XE == 0).double().mean()
        entropy = torch.special.entr(share_XE).sum(1).mean() / math.log(share_XE.shape[1])
        return dict(
            zip((LARGEST_LOAD, UNUSED, LOAD_ENTROPY), torch.stack([largest, unused, entropy]).tolist(), strict=True)
        )

    def _reduce(self) -> dict[str, float]:
        if not self._sums:
            return {}
        pairs = torch.stack(list(self._sums.values()))
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            torch.distributed.all_reduce(pairs, group=mesh.get_group())
        rows = zip(self._sums, pairs.tolist(), strict=True)
        # A count of skipped updates is a total, everything else an average.
        return {name: total if name == SKIPPED else total / max(number, 1.0) for name, (total, number) in rows}

    def _largest_rank_loss(self) -> float | None:
        """Over the data-parallel ranks with maskable tokens; None if there are none. torchtitan's own divides 0 by 0
        there."""
        if self._rank_loss is None:
            return None
        total, maskable = self._rank_loss
        mesh = self.parallel_dims.get_optional_mesh("cp")
        if mesh is not None:
            total = total.clone()
            torch.distributed.all_reduce(total, group=mesh.get_group())
        largest = torch.where(maskable > 0, total / maskable, -torch.inf)
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, mesh.get_group())
        return None if largest == -torch.inf else largest.item()

    def log_step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, tokens_seen: int) -> None:
        """Reduce over ranks, and write a step to TensorBoard and the console.

        Args:
            loss: this rank's share of the global batch's.
            tokens_seen: by all ranks.
        """
        dims = self.parallel_dims
        average = dist_sum(loss, dims.get_optional_mesh("loss")) if dims.dp_cp_enabled else loss.item()
        largest = self._largest_rank_loss()
        scalars = self._reduce() | self._load_balance()
        inner = [scalars[name] for k in range(len(scalars)) if (name := INNER_LOSS.format(k + 1)) in scalars]
        suffix = f"  inner loss: {' -> '.join(f'{loss:.4f}' for loss in inner)}" if inner else ""
        ours = {"n_tokens_seen": tokens_seen, "lr": lr, **scalars, **self.totals}
        with appending_to_step_line(suffix):
            super().log(step, average, average if largest is None else largest, grad_norm.item(), ours)

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the next step line's throughput."""
        self.time_last_log += seconds

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars to TensorBoard (and whatever else is on)."""
        self.logger.log(scalars, step)
