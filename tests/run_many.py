"""The training entry point many times over, on several ranks, for one start of Python.

    python tests/run_many.py JSON

JSON is a list of {"processes", "arguments"} and, optionally, "record": a folder where every rank writes down what it
drew (see `record`), "faults" (see faults.py), "status": the exit status that is expected, 0 by default, or "any", and
"environment". Importing torch and torchtitan costs ten times what a few debug steps do, so this imports once and forks
the ranks of each run, one run after the other. Each run has fresh processes and a rendezvous of its own. The flavour
`tiny` exists here alone.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from faults import inject
from ranks import fork
from torch.distributed.tensor import DTensor

from memdlm_dist import train
from memdlm_dist.method import trajectory
from memdlm_dist.method.bilevel import Memory
from memdlm_dist.method.fast_weights import leaves
from memdlm_dist.models.flavours import LLADA as FLAVOURS
from memdlm_dist.models.llada import LLaDAArgs
from memdlm_dist.training.objective import Objective

# Two layers, so that one is trunk and one is tail: half the time of `debug` where every operation counts.
FLAVOURS["tiny"] = LLaDAArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=512)

# torchtitan sleeps two seconds at the end of every run.
sys.modules["torchtitan.train"].time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)


def digest(*tensors: torch.Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def record(folder: str, number: int) -> None:
    """Write down, for every step and sample: its noise level, its states as the model reads them, its A."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / f"rank{number}.jsonl", "a", buffering=1)  # noqa: SIM115  (open until the process ends)

    def write(kind: str, step: int, ids: torch.Tensor, *per_row: torch.Tensor) -> None:
        for row, sample in enumerate(ids.tolist()):
            file.write(json.dumps([kind, step, sample, digest(*(x[row] for x in per_row))]) + "\n")

    plain_draw, plain_batch, plain_fast = trajectory.draw, Objective.micro_batch, Memory.draw

    def draw(seed, step, ids, maskable, *rest):
        drawn = plain_draw(seed, step, ids, maskable, *rest)
        write("level", step, ids, drawn.t_U)
        return drawn

    def micro_batch(self, tokens, labels, ids, step, **rest):
        # A context-parallel rank has a part of the states: what is written is what the parts are of.
        whole = plain_batch(
            replace(self, parts=1, part=0, shards=self.parts * self.shards), tokens, labels, ids, step, **rest
        )
        write("states", step, ids, *whole.inputs)
        return whole.part(self.part, self.parts)

    def fast(self, seed, step, ids):
        drawn = plain_fast(self, seed, step, ids)
        write("A", step, ids, *(x.full_tensor() if isinstance(x, DTensor) else x for x in leaves(drawn)))
        return drawn

    trajectory.draw, Objective.micro_batch, Memory.draw = draw, micro_batch, fast


def run(processes: int, arguments: list[str], **options: Any) -> int:
    def rank(number: int) -> int:
        os.environ.update(options.get("environment", {}))
        if folder := options.get("record"):
            record(folder, number)
        if faults := options.get("faults"):
            inject(faults)
        return train.main(arguments)

    return fork(processes, rank)


if __name__ == "__main__":
    for entry in json.loads(sys.argv[1]):
        began = time.perf_counter()
        expected = entry.pop("status", 0)
        status = run(**entry)
        seconds = time.perf_counter() - began
        print(f"status {status} after {seconds:.1f} s: {entry}", flush=True)
        if expected not in (status, "any"):
            sys.exit(1)
