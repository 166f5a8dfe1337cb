"""Metrics of the objective and the memory, logged with torchtitan's own scalars and step line."""

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
FAST_WEIGHT_NORM = "parametric_memory/fast_weight_norm"
RELATIVE_WRITE = "parametric_memory/relative_write"
ANCHOR_NLL = "parametric_memory/anchor_nll_{}"  # "before", "step_2", "after"
SKIPPED_UPDATES = "parametric_memory/skipped_updates"
HARDWARE_FLOPS = "parametric_memory/hardware_flops_ratio"
MASK_RATIO = "diffusion/mask_ratio"
FILL_RATIO = "data/fill_ratio"
SKIPPED_BATCHES = "reliability/skipped_batches"
LARGEST_LOAD = "experts/largest_load"
UNUSED = "experts/unused"
LOAD_ENTROPY = "experts/load_entropy"


class MemDLMMetrics(MetricsProcessor):
    """torchtitan's metrics processor with scalars averaged over micro-batches and data-parallel ranks.

    The trainer records the scalars during a step. The ranks of a context-parallel group record the same values, except
    for the rank loss and the expert load. Recorded values stay on the device: only `log_step` reduces them and waits
    for the device.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self.totals: dict[str, float] = {}  # counters of the run, equal on every rank
        self.start_step()

    def start_step(self) -> None:
        """Discard the records of the previous step."""
        self._sums: dict[str, Tensor] = {}  # name -> [sum, count]
        self._of_sets: set[str] = set()  # averages over sets of fast weights, of which a step may have none
        self._rank_loss: Tensor | None = None  # [loss sum, its divisor] of this rank
        # Sums over this rank's tokens, also where the ranks of a group have other tokens of the same rows.
        self._anchor_nll: dict[str, Tensor] = {}  # name -> [sum, count]
        self._write_X2: Tensor | None = None
        self._expert_load: Tensor | None = None

    def record(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Add the entries of `values` where `counted` is true (default: all) to a scalar's average."""
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
        self.record_ratio(name, torch.where(counted, values, 0.0).sum(), counted.sum())

    def record_ratio(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add `total` to the numerator and `count` to the denominator of a scalar."""
        pair = torch.stack([total.float(), count.float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def record_rank_loss(self, loss_sum: Tensor, divisor: Tensor) -> None:
        """Add a micro-batch to this rank's loss, for the maximum over ranks.

        Args:
            loss_sum: of the micro-batch.
            divisor: number of its maskable tokens, or of samples with one, see `diffusion.loss_norm`.
        """
        pair = torch.stack([loss_sum.detach().float(), divisor.float()])
        self._rank_loss = pair if self._rank_loss is None else self._rank_loss + pair

    def record_inner_loop(self, statistics: InnerStatistics) -> None:
        """Record the inner loop's losses, gradient norms, total changes and skipped updates, and what it changed.

        The number of skipped updates is a sum. The others are averages over sets with a scored token and finite values.
        """
        for name, pair in statistics.anchor_nll.items():
            name = ANCHOR_NLL.format(name)
            self._anchor_nll[name] = self._anchor_nll[name] + pair if name in self._anchor_nll else pair
        if (write_X2 := statistics.write_X2) is not None:
            self._write_X2 = write_X2 if self._write_X2 is None else self._write_X2 + write_X2
        for k, counted_G in enumerate(statistics.counted_KG):
            self._record_sets(INNER_LOSS.format(k + 1), statistics.loss_KG[k], counted_G)
            self._record_sets(INNER_GRAD_NORM.format(k + 1), statistics.grad_norm_KG[k], counted_G)
        self._record_sets(FAST_WEIGHT_NORM, statistics.written_norm_G, statistics.counted_KG.any(0))
        self.record(SKIPPED_UPDATES, statistics.skipped_KG.float().sum().unsqueeze(0))

    def _record_sets(self, name: str, values_G: Tensor, counted_G: Tensor) -> None:
        self._of_sets.add(name)
        self.record(name, values_G, counted_G)

    def record_expert_load(self, load_XE: Tensor) -> None:
        """Record this rank's tokens per layer and expert, `[X, E]`, since the last logged step."""
        self._expert_load = load_XE

    def _load_balance(self) -> dict[str, float]:
        """Return the load balance of the experts over all ranks, averaged over layers.

        Largest load: the maximum divided by the mean of a layer's experts (1 is balanced). Unused: share of experts
        without a token. Load entropy: 1 for a uniform load.
        """
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
        """Return the recorded scalars, averaged over data-parallel ranks."""
        if not self._sums:
            return {}
        pairs = torch.stack(list(self._sums.values()))
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            torch.distributed.all_reduce(pairs, group=mesh.get_group())
        rows = zip(self._sums, pairs.tolist(), strict=True)
        # Skipped updates are a sum, all other scalars are averages.
        return {
            name: total if name == SKIPPED_UPDATES else total / max(count, 1.0)
            for name, (total, count) in rows
            if count or name not in self._of_sets
        }

    def _memory_effect(self) -> dict[str, float]:
        """Return -log p of the anchor's tokens per token, and the relative write, over all ranks, if there are any.

        The relative write of a linear is the norm of its fast-weight term divided by the norm of its own output, over
        the tokens of all samples with a term; the scalar is the mean over linears, without the experts' row-wise ones.
        """
        if self._write_X2 is None:
            return {}
        nll = torch.stack([*self._anchor_nll.values()]) if self._anchor_nll else self._write_X2.new_zeros(0, 2)
        pairs = torch.cat([nll, self._write_X2])
        for name in ("loss", "tp"):  # tensor-parallel ranks add the same nll and count, and shards of a linear's output
            mesh = self.parallel_dims.get_optional_mesh(name)
            if mesh is not None:
                torch.distributed.all_reduce(pairs, group=mesh.get_group())
        values = pairs.tolist()
        names = zip(self._anchor_nll, values[: len(nll)], strict=True)
        scalars = {name: total / count for name, (total, count) in names if count}
        writes = [math.sqrt(term / own) for term, own in values[len(nll) :] if own > 0]
        return scalars | ({RELATIVE_WRITE: sum(writes) / len(writes)} if writes else {})

    def _largest_rank_loss(self) -> float | None:
        """Return the largest loss among the data-parallel ranks with maskable tokens.

        None if there is no such rank, or if no loss was recorded.

        torchtitan's own maximum divides 0 by 0 on a rank without maskable tokens.
        """
        if self._rank_loss is None:
            return None
        total, divisor = self._rank_loss
        mesh = self.parallel_dims.get_optional_mesh("cp")
        if mesh is not None:
            total = total.clone()
            torch.distributed.all_reduce(total, group=mesh.get_group())
        largest = torch.where(divisor > 0, total / divisor, -torch.inf)
        mesh = self.parallel_dims.get_optional_mesh("batch")
        if mesh is not None:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, mesh.get_group())
        return None if largest == -torch.inf else largest.item()

    def log_step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, tokens_seen: int) -> None:
        """Reduce the step's metrics over all ranks and write them to TensorBoard and the console.

        Args:
            loss: this rank's share of the global batch's loss.
            grad_norm: before clipping.
            tokens_seen: tokens that all ranks have read so far.
        """
        dims = self.parallel_dims
        average = dist_sum(loss, dims.get_optional_mesh("loss")) if dims.dp_cp_enabled else loss.item()
        largest = self._largest_rank_loss()
        effect = self._memory_effect()
        scalars = self._reduce() | effect | self._load_balance()
        suffix = _memory_line(scalars, effect)
        extra_metrics = {"n_tokens_seen": tokens_seen, "lr": lr, **scalars, **self.totals}
        with appending_to_step_line(suffix):
            super().log(step, average, average if largest is None else largest, grad_norm.item(), extra_metrics)

    def exclude(self, seconds: float) -> None:
        """Exclude seconds that were not spent on training from the next step line's throughput."""
        self.time_last_log += seconds

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars to TensorBoard and any other logger of torchtitan that is enabled."""
        self.logger.log(scalars, step)


def _memory_line(scalars: dict[str, float], effect: dict[str, float]) -> str:
    """Format the inner losses and the memory's effect for the console; empty without memory.

    Inner losses are losses of different states with different weights. The anchor's nll compares the same tokens.
    """
    inner = [scalars[name] for k in range(len(scalars)) if (name := INNER_LOSS.format(k + 1)) in scalars]
    nll = [value for name, value in effect.items() if name != RELATIVE_WRITE]
    parts = {
        "inner loss": " -> ".join(f"{loss:.4f}" for loss in inner),
        "anchor nll": " -> ".join(f"{value:.4f}" for value in nll),
        "write": f"{effect[RELATIVE_WRITE]:.2%}" if RELATIVE_WRITE in effect else "",
    }
    return "".join(f"  {name}: {text}" for name, text in parts.items() if text)
