"""Benchmark of fine-tuning rows of different lengths: padded to seq_len, in buckets, and grouped by length.

Shapes: N rows, T micro-batches of n rows over all data-parallel ranks, B rows of this rank, L tokens.
"""

import statistics
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import utils as dist_utils

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.row_lengths import RowLengths, buckets, padded_length
from memdlm_dist.errors import require
from memdlm_dist.method.documents import PADDING
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.performance.bench_steps import Bench
from memdlm_dist.performance.measure import say, timed
from memdlm_dist.runtime.device import device_type

WHOLE, BUCKETS, GROUPED = "padded to seq_len", "in buckets", "grouped by length"
ARRANGEMENTS = (WHOLE, BUCKETS, GROUPED)
MULTIPLE = 128
MICRO_BATCHES = 8  # of a step
_SEED = 0
_RESPONSE = 0.25  # share of a row's content


def draw_content(rows: int, seq_len: int) -> NDArray[np.uint32]:
    """Draw the content lengths of a mix like LongAlpaca's, `[rows]`.

    Half of the rows are short instructions, log-normal with median seq_len / 20; half are long texts, uniform from
    seq_len / 4 to seq_len.
    """
    rng = np.random.default_rng(_SEED)
    short = rng.lognormal(np.log(seq_len / 20), 0.8, rows)
    long = rng.uniform(seq_len / 4, seq_len, rows)
    return np.where(rng.random(rows) < 0.5, short, long).clip(8, seq_len).astype(np.uint32)


def arrange(lengths: RowLengths, global_batch_size: int, rows: int) -> dict[str, tuple[NDArray[np.int64], ...]]:
    """Return ids `[T, rows]` and lengths `[T]` of the micro-batches of each arrangement."""
    ids_N = np.arange(len(lengths.padded_N))
    drawn = ids_N.reshape(-1, rows)
    grouped = lengths.group(ids_N, global_batch_size, _SEED, 0).reshape(-1, rows)
    return {
        WHOLE: (drawn, np.full(len(drawn), lengths.buckets[-1])),
        BUCKETS: (drawn, lengths.bucket(drawn)),
        GROUPED: (grouped, lengths.bucket(grouped)),
    }


def micro_batch(bench: Bench, content_B: Tensor, row_B: Tensor, length: int, whole: bool, number: int) -> MicroBatch:
    """Draw a micro-batch of random tokens with noise.

    Args:
        bench: the bench.
        content_B: content of each row, in tokens; its last quarter is the response.
        row_B: length of each row with its padding.
        length: L.
        whole: rows are padded to L, and all of the padding is scored; otherwise what follows `row_B` is fill.
        number: key of the tokens and the noise.
    """
    generator = torch.Generator().manual_seed(number)
    shape = (len(content_B), length)
    tokens_BL = torch.randint(0, bench.args.vocab_size - 1, shape, generator=generator)
    position_L = torch.arange(length)
    labels_BL = torch.where(position_L < ((1 - _RESPONSE) * content_B)[:, None], IGNORE_INDEX, tokens_BL)
    documents_BL = None
    if not whole:
        documents_BL = torch.where(position_L < row_B[:, None], 0, PADDING)
        labels_BL = torch.where(documents_BL == PADDING, IGNORE_INDEX, labels_BL)
    ids_B = torch.arange(len(content_B)) + 1_000_003 * number
    return bench.objective.micro_batch(tokens_BL, labels_BL, ids_B, step=1, documents_BL=documents_BL).to(device_type())


def measure_mix(config: JobConfig, rounds: int, warm_up: int, layers: int | None = None) -> dict[str, Any]:
    """Measure our step on a mix of row lengths in each arrangement; all ranks must call this.

    Args:
        config: a resolved configuration; rows have at most `training.seq_len` tokens.
        rounds: measured rounds, of one step in each arrangement.
        warm_up: earlier rounds, which are not measured. Before them, each length runs once.
        layers: number of layers; None for the flavour's.
    """
    require(
        len(buckets(config.training.seq_len, MULTIPLE)) > 1,
        f"--mix needs a training.seq_len above {MULTIPLE}, but it is {config.training.seq_len}; raise it.",
    )
    bench = Bench.build(config, layers)
    optimizer = build_optimizers([bench.model], config.optimizer, bench.dims)
    size, seq_len = config.training.local_batch_size, config.training.seq_len
    mesh = bench.dims.get_optional_mesh("batch")
    dp_rank, rows = (mesh.get_local_rank(), size * mesh.size()) if mesh is not None else (0, size)
    content_N = draw_content(rounds * MICRO_BATCHES * rows, seq_len)
    padded_N = np.array([padded_length(int(n), MULTIPLE, seq_len) for n in content_N], dtype=np.uint32)
    lengths = RowLengths(content_N, padded_N, buckets(seq_len, MULTIPLE))
    arranged = arrange(lengths, MICRO_BATCHES * rows, rows)

    def draw(name: str, t: int, length: int | None = None) -> MicroBatch:
        ids_Tn, length_T = arranged[name]
        ids = ids_Tn[t, dp_rank * size : (dp_rank + 1) * size]
        content_B, row_B = (torch.from_numpy(x[ids].astype(np.int64)) for x in (content_N, padded_N))
        length = length or int(length_T[t])
        return micro_batch(bench, content_B.clamp(max=length), row_B.clamp(max=length), length, name == WHOLE, t)

    def step(batches: list[MicroBatch]) -> None:
        for batch in batches:
            loss, _ = bench.loss_sum("ours", batch, 1)
            (loss / (batch.maskable.clamp(min=1) * len(batches))).backward()
        dist_utils.clip_grad_norm_(list(bench.model.parameters()), config.training.max_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    say(f"lengths {', '.join(map(str, lengths.buckets))} (warm-up)")
    step([draw(BUCKETS, 0, length) for length in lengths.buckets])
    seconds: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    for number in range(-warm_up, rounds):
        for name in ARRANGEMENTS:
            first = max(number, 0) * MICRO_BATCHES
            duration = timed(partial(step, [draw(name, t) for t in range(first, first + MICRO_BATCHES)]))
            if number >= 0:
                seconds[name].append(duration)
        say(f"round {number + warm_up + 1} of {warm_up + rounds}" + (" (warm-up)" if number < 0 else ""))

    # A step's cost depends on its rows, and arrangements differ in which rows a step has: only sums compare.
    total = {name: sum(times) for name, times in seconds.items()}
    tokens = {name: int(length_T.sum()) * rows for name, (_, length_T) in arranged.items()}
    content, padded = int(content_N.sum()), int(padded_N.sum())
    return {
        "rows": len(content_N),
        "buckets": lengths.buckets,
        "content": content,
        "padding": {name: tokens[name] - content if name == WHOLE else padded - content for name in ARRANGEMENTS},
        "fill": {name: 0 if name == WHOLE else tokens[name] - padded for name in ARRANGEMENTS},
        "step_seconds": {name: total[name] / rounds for name in ARRANGEMENTS},
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "over_whole": {name: total[name] / total[WHOLE] for name in ARRANGEMENTS},
    }


def table_of_mix(result: dict[str, Any]) -> str:
    """Format the results of `measure_mix` as a table."""
    lines = [
        f"{'':<20}" + "".join(f"{head:>14}" for head in ("content", "padding", "fill", "mean step (s)", "relative"))
    ]
    for name in ARRANGEMENTS:
        cells = [f"{result['content']:,}", *(f"{result[key][name]:,}" for key in ("padding", "fill"))]
        cells += [f"{result['step_seconds'][name]:.3f}", f"{result['over_whole'][name]:.3f}"]
        lines.append(f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
