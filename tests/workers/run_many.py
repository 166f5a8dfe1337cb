"""Training runs in forked ranks, with optional recording of random draws and injected faults.

    python -m tests.workers.run_many PROCESSES [--job.config_file FILE ...]

Options of `train_rank`: "record", a folder to which every rank writes its draws (see `record`); "faults", a list of
faults (see tests/support/faults.py).
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist import train
from memdlm_dist.method import trajectory
from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.fast_weight_tree import leaves
from memdlm_dist.method.sets import Sets
from memdlm_dist.training.objective import Objective
from tests.support.faults import inject
from tests.support.ranks import fork


def digest(*tensors: torch.Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def record(folder: str, rank: int) -> None:
    """Patch this rank to write digests of noise level and input states of every step and sample, and of every A."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / f"rank{rank}.jsonl", "a", buffering=1)  # noqa: SIM115  (open until the process ends)

    def write(kind: str, step: int, ids: torch.Tensor, *per_row: torch.Tensor) -> None:
        for row, sample in enumerate(ids.tolist()):
            file.write(json.dumps([kind, step, sample, digest(*(x[row] for x in per_row))]) + "\n")

    plain_draw, plain_batch, plain_fast = trajectory.draw, Objective.micro_batch, Memory.draw

    def draw(seed, step, ids, maskable, *rest):
        drawn = plain_draw(seed, step, ids, maskable, *rest)
        write("level", step, ids, drawn.t_U)
        return drawn

    def micro_batch(self, tokens, labels, ids, step, **rest):
        # A context-parallel rank reads a slice of the states; the digest covers the full states.
        batch = plain_batch(
            replace(self, cp_size=1, cp_rank=0, tp_size=self.cp_size * self.tp_size), tokens, labels, ids, step, **rest
        )
        write("states", step, ids, *batch.inputs)
        return batch.cp_slice(self.cp_rank, self.cp_size)

    def fast(self, seed, step, ids, slots=1):
        drawn = plain_fast(self, seed, step, ids, slots)
        first = Sets(len(ids) // slots, slots, self.samples_per_set).first_samples(ids.device)
        write("A", step, ids[first], *(x.full_tensor() if isinstance(x, DTensor) else x for x in leaves(drawn)))
        return drawn

    trajectory.draw, Objective.micro_batch, Memory.draw = draw, micro_batch, fast


def train_rank(rank: int, arguments: list[str], options: dict[str, Any]) -> int:
    """Train as one rank; return the exit status."""
    # Skip torchtitan's sleep of two seconds at the end of every run.
    time_ = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    sys.modules["torchtitan.train"].time = time_  # type: ignore[attr-defined]
    if folder := options.get("record"):
        record(folder, rank)
    if faults := options.get("faults"):
        inject(faults)
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(fork(int(sys.argv[1]), lambda rank: train_rank(rank, sys.argv[2:], {})))
