"""Benchmark of `parametric_memory.probability`: time, FLOPs and all-gathers at several values, for both units.

All values are measured in the same rounds, on the same tokens and noise. A round takes one *cycle* of steps for each
value: a fixed list of steps in which the share of groups of rows that train with the memory equals the probability. (A
group of rows is the rows that share a set of fast weights.)

Shapes: N steps of a cycle, R data-parallel ranks, G groups of rows in a rank's micro-batch, T candidate cycles.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from memdlm_dist.errors import require
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.sets import Sets
from memdlm_dist.models.flops import Recomputation, step_flops
from memdlm_dist.performance.bench_steps import DATA_PARALLEL, Bench
from memdlm_dist.performance.collectives import by_kind
from memdlm_dist.performance.measure import say, timed
from memdlm_dist.runtime.device import device_module, device_type
from memdlm_dist.training.backbone import get_lora


class Setting(NamedTuple):
    """A kind of training to measure."""

    unit: str  # "plain", or `parametric_memory.probability_unit`: "step" or "sample"
    probability: float


PLAIN = Setting("plain", 0.0)
# A step: the number of groups of rows that train with the memory on each data-parallel rank, `[R]`; None: a plain step.
Step = tuple[int, ...] | None
LARGEST_DENOMINATOR = 20  # of a probability, so that a cycle has few steps
LONGEST_CYCLE = 60  # steps
_LEAST_STEPS = 4  # of a cycle
_CANDIDATES = 1000
_SEED = 0


def slowest_share(probability: float, ranks: int, counts: Sequence[int]) -> float:
    """Compute the expected share of groups of rows that the inner loop reads on the slowest rank of a step.

    With unit "sample" each rank chooses Binomial(G, p) groups, and its inner loop reads c >= that many, one of the
    counts 0 = c_0 < c_1 < ... = G. With F(c) = P(Binomial(G, p) <= c),

        E[max over R ranks] / G = sum over i >= 1 of (c_i - c_{i-1}) (1 - F(c_{i-1})^R) / G

    Args:
        probability: p.
        ranks: R.
        counts: `Objective.row_counts(G)`, increasing; a first count above 0 is always read.
    """
    groups = counts[-1]
    mass = [math.comb(groups, k) * probability**k * (1 - probability) ** (groups - k) for k in range(groups + 1)]
    slowest = sum((b - a) * (1 - sum(mass[: a + 1]) ** ranks) for a, b in itertools.pairwise(counts))
    return (counts[0] + slowest) / groups


def cycle_length(probabilities: Sequence[float]) -> int:
    """Return N, the number of steps in which every probability has a whole number of steps.

    Raises:
        UserError: if N exceeds `LONGEST_CYCLE`.
    """
    denominators = [Fraction(p).limit_denominator(LARGEST_DENOMINATOR).denominator for p in probabilities]
    least = math.lcm(*denominators)
    require(
        least <= LONGEST_CYCLE,
        f"--probabilities {' '.join(f'{p:g}' for p in probabilities)} needs rounds of {least} steps, more than "
        f"{LONGEST_CYCLE}; choose multiples of one fraction, such as 0.25.",
    )
    return least * -(-_LEAST_STEPS // least)


def draw_cycle(setting: Setting, length: int, ranks: int, counts: Sequence[int]) -> list[Step]:
    """Return the steps of a cycle, the same on all ranks.

    With unit "step" the first p N steps train all samples with the memory, and the others are plain. With unit "sample"
    the cycle is the best of many draws: its share of chosen groups is nearest to p, and among equally near ones the
    share that its slowest rank reads is nearest to `slowest_share`.

    Args:
        setting: unit and p.
        length: N.
        ranks: R.
        counts: `Objective.row_counts(G)`.
    """
    groups, probability = counts[-1], setting.probability
    if setting.unit == "step":
        with_memory = round(probability * length)
        return [(groups,) * ranks] * with_memory + [None] * (length - with_memory)
    drawn_TNR = np.random.default_rng(_SEED).binomial(groups, probability, (_CANDIDATES, length, ranks))
    slowest_T = np.take(counts, np.searchsorted(counts, drawn_TNR)).max(2).mean(1) / groups
    off_share_T = abs(drawn_TNR.sum((1, 2)) - probability * groups * ranks * length).round(6)
    off_slowest_T = abs(slowest_T - slowest_share(probability, ranks, counts))
    best = np.lexsort((off_slowest_T, off_share_T))[0]
    return [tuple(row) for row in drawn_TNR[best].tolist()]


def measure_probabilities(bench: Bench, probabilities: Sequence[float], rounds: int, warm_up: int) -> dict[str, Any]:
    """Measure plain steps, and steps at several probabilities for both units; all ranks must call this.

    With one set of fast weights per micro-batch (granularity "batch"), the unit is always "step".

    Args:
        bench: the sharded backbone.
        probabilities: values to measure, multiples of 1 / n with n <= `LARGEST_DENOMINATOR`.
        rounds: measured rounds, of one cycle for each value.
        warm_up: earlier rounds, which are not measured.
    """
    config, memory = bench.config, bench.objective.memory
    assert memory is not None
    rows, ranks = config.training.local_batch_size, bench.dims.dp_replicate * bench.dims.dp_shard
    mesh = bench.dims.get_optional_mesh("batch")
    dp_rank = mesh.get_local_rank() if mesh is not None else 0
    counts = bench.objective.row_counts(rows // Sets(rows, 1, memory.samples_per_set).rows_per_set)
    length = cycle_length(probabilities)
    units = ("step",) if memory.samples_per_set is None else ("step", "sample")
    settings = [Setting(unit, p) for unit in units for p in dict.fromkeys(probabilities)]
    cycles = {PLAIN: [None] * length} | {x: draw_cycle(x, length, ranks, counts) for x in settings}

    recomputation = Recomputation(config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option)
    frozen = get_lora(config) is not None

    def count_flops(step: Step, batch: MicroBatch) -> Tensor:
        """Count a step's FLOPs, `[2]`: the mean over all ranks, and the maximum."""
        flops = sum(step_flops(bench.args, batch, memory if step is not None else None, recomputation, frozen))
        mean, largest = torch.full((2, 1), flops, device=device_type())
        dist.all_reduce(mean)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return torch.cat([mean / dist.get_world_size(), largest]).cpu()

    @cache
    def all_gathers(step: Step) -> int:
        recorded = bench.collectives(_kind(step), adapted_groups=_groups(step, dp_rank))
        return by_kind(recorded.on(*bench.groups(*DATA_PARALLEL)))["all_gather"]

    seconds: dict[Setting, list[float]] = {x: [] for x in cycles}  # means of each round
    flops = {x: torch.zeros(2) for x in cycles}  # sums over all measured steps
    run, order = bench.optimizer_step(), list(cycles)
    for number in range(warm_up + rounds):
        measured = number >= warm_up
        total = dict.fromkeys(cycles, 0.0)
        for index in range(number * length, (number + 1) * length):
            first = index % len(order)
            for setting in order[first:] + order[:first]:
                step = cycles[setting][index % length]
                batch = bench.batch(index, _groups(step, dp_rank))
                total[setting] += timed(partial(run, _kind(step), index, batch))
                if measured:
                    flops[setting] += count_flops(step, batch)
        if measured:
            for setting, duration in total.items():
                seconds[setting].append(duration / length)
        say(f"round {number + 1} of {warm_up + rounds}" + ("" if measured else " (warm-up)"))

    def results(setting: Setting) -> dict[str, Any]:
        times, cycle = seconds[setting], cycles[setting]
        mean_flops, slowest_flops = (flops[setting] / flops[PLAIN]).tolist()
        read = [0 if step is None else min(c for c in counts if c >= max(step)) for step in cycle]
        return {
            "unit": setting.unit,
            "probability": setting.probability,
            "step_seconds": statistics.median(times),
            "step_seconds_range": [min(times), max(times)],
            "over_plain": statistics.median(a / b for a, b in zip(times, seconds[PLAIN], strict=True)),
            "flops_over_plain": mean_flops,
            "slowest_rank_flops_over_plain": slowest_flops,
            "slowest_share": statistics.mean(read) / counts[-1],
            "expected_slowest_share": (
                slowest_share(setting.probability, ranks, counts) if setting.unit == "sample" else setting.probability
            ),
            "all_gathers": [f(map(all_gathers, cycle)) for f in (min, max)],
        }

    return {
        "device": device_module().get_device_name(),
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "rounds": rounds,
        "steps_per_round": length,
        "data_parallel_ranks": ranks,
        "groups": counts[-1],
        "settings": [results(x) for x in cycles],
    }


def _kind(step: Step) -> str:
    return "plain" if step is None else "ours"


def _groups(step: Step, dp_rank: int) -> int:
    """Return the number of groups of rows that train with the memory on a data-parallel rank."""
    return 0 if step is None else step[dp_rank]


def table_of_probabilities(result: dict[str, Any]) -> str:
    """Format the results of `measure_probabilities` as a table."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "step (s)": lambda x: f"{x['step_seconds']:.3f}",
        "over plain": lambda x: f"{x['over_plain']:.3f}",
        "by FLOPs": lambda x: f"{x['flops_over_plain']:.3f}",
        "slowest rank": lambda x: f"{x['slowest_rank_flops_over_plain']:.3f}",
        "its share": lambda x: f"{x['slowest_share']:.3f}",
        "expected": lambda x: f"{x['expected_slowest_share']:.3f}",
        "all-gathers": lambda x: " to ".join(map(str, sorted(set(x["all_gathers"])))),
    }
    lines = [f"{'':<12}" + "".join(f"{name:>14}" for name in columns)]
    for x in result["settings"]:
        name = x["unit"] if x["unit"] == PLAIN.unit else f"{x['unit']} {x['probability']:g}"
        lines.append(f"{name:<12}" + "".join(f"{value(x):>14}" for value in columns.values()))
    return "\n".join(lines)
