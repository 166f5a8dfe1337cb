"""Fault injection into a training rank.

    python -m tests.support.faults FAULTS --job.config_file ... (under torchrun, or alone)

FAULTS is a JSON list of objects with the keys "do", "at" and "step", and optionally "rank" (all ranks by default) and
"once", a file that is created when the fault happens and prevents the fault in a restarted run.

do:

- a signal's name: sends the signal to this process
- "nan": the loss is not finite
- "hang", "sleep", "work": waits for ever, sleeps 2 s, computes for 3.5 s
- "full", "room": from now on files cannot grow beyond 4 KiB, can grow again
- "mark": only creates the file "once"
- "raise", "bug": raises an OSError, a KeyError
- "remove": removes the folder "path"
- "steal": another job takes over the folder "path"
- "impatient": from the start of the run, nothing is retried
- "skew": from the start of the run, the node's clock is 60 s slow

at:

- "step": before the step's forward pass
- "data": when the step's batch is loaded, during the previous step
- "answer": before this rank answers a batch of validation.tasks
- "save": at the start of a save
- "export": at the start of an export to a Hugging Face folder
- "convert": when an export converts the model's state dict, before DCP's collectives
- "consolidate": when an export's shards are written, on the ranks that consolidate them into files
- "write": when half of this rank's checkpoint file is written
- "metadata": when all files of the checkpoint except its metadata are written
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist import train
from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.checkpoint.manager import ResumableCheckpoints
from memdlm_dist.data.loader import EpochLoader
from memdlm_dist.inference.predictor import Predictor
from memdlm_dist.models.state_dict_adapters import LLaDAStateDictAdapter
from memdlm_dist.runtime import preemption, storage, writer
from memdlm_dist.training.objective import Objective
from memdlm_dist.training.prefetch import BatchPrefetcher
from memdlm_dist.training.trainer import MemDLMTrainer


def hang() -> None:
    while True:
        time.sleep(1)


def inject(faults: Iterable[dict[str, Any]]) -> None:
    """Patch the training code of this process so that the faults of its rank happen."""
    mine = [fault for fault in faults if fault.get("rank", int(os.environ.get("RANK", "0"))) == int(os.environ["RANK"])]
    current = {"step": 0, "data": 0}  # current step; step whose batches are being loaded

    def inject_at(at: str) -> set[str]:
        done = set()
        for fault in mine:
            if fault.get("at") != at or fault["step"] != current["data" if at == "data" else "step"]:
                continue
            if once := fault.get("once"):
                if Path(once).exists():
                    continue
                Path(once).parent.mkdir(parents=True, exist_ok=True)
                Path(once).touch()
            if fault["do"].startswith("SIG"):
                if fault["do"] == "SIGINT":  # background commands of a shell inherit SIGINT as ignored
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                os.kill(os.getpid(), getattr(signal, fault["do"]))
            elif fault["do"] == "hang":
                hang()
            elif fault["do"] == "sleep":
                time.sleep(2)
            elif fault["do"] == "work":
                began = time.monotonic()
                while time.monotonic() < began + 3.5:
                    sum(range(1000))
            elif fault["do"] == "remove":
                shutil.rmtree(fault["path"])
            elif fault["do"] == "steal":
                other = writer.Writer("other", (0, 0), "node7", 1, "now")
                storage.Storage(fault["path"]).write_json(writer.LEASE, asdict(other))
            elif fault["do"] == "raise":
                raise OSError("away for a moment")
            elif fault["do"] == "bug":
                raise KeyError("layers.0")
            elif fault["do"] in ("full", "room"):
                limit = 4096 if fault["do"] == "full" else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            done.add(fault["do"])
        return done

    if any(fault["do"] == "impatient" for fault in mine):
        storage.PATIENCE = writer.PATIENCE = 0
    if any(fault["do"] == "skew" for fault in mine):
        clock = time.time
        time.time = lambda: clock() - 60

    plain_step, plain_loss, plain_read = MemDLMTrainer.train_step, Objective.loss_sum, EpochLoader._read
    plain_load, plain_generate = BatchPrefetcher._load, Predictor.generate
    plain_export, plain_consolidate = hugging_face_folder.export, hugging_face_folder.consolidate_safetensors
    plain_to_hf = LLaDAStateDictAdapter.to_hf
    plain_save, plain_write, plain_finish = (
        ResumableCheckpoints.dcp_save, FileSystemWriter.write_data, FileSystemWriter.finish,
    )  # fmt: skip

    def train_step(self, *arguments):
        current["step"] = self.step
        plain_step(self, *arguments)

    def loss_sum(self, model, batch, step, *rest, **named):
        poisoned = "nan" in inject_at("step")
        loss, statistics = plain_loss(self, model, batch, step, *rest, **named)
        return (loss * torch.nan if poisoned else loss), statistics

    def load(self, batches, step):
        current["data"] = step
        return plain_load(self, batches, step)

    def read(self):
        for batch in plain_read(self):
            inject_at("data")
            yield batch

    def generate(self, *arguments, **named):
        inject_at("answer")
        return plain_generate(self, *arguments, **named)

    def dcp_save(self, *arguments, **named):
        inject_at("save")
        return plain_save(self, *arguments, **named)

    def export(*arguments, **named):
        inject_at("export")
        return plain_export(*arguments, **named)

    def to_hf(self, state):
        inject_at("convert")
        return plain_to_hf(self, state)

    def consolidate(*arguments):
        inject_at("consolidate")
        plain_consolidate(*arguments)

    def write_data(self, plan, planner):
        written = plain_write(self, plan, planner)
        for file in Path(self.path).glob(f"__{os.environ['RANK']}_*"):
            if any(fault.get("at") == "write" and fault["step"] == current["step"] for fault in mine):
                os.truncate(file, file.stat().st_size // 2)
        inject_at("write")
        return written

    def finish(self, *arguments, **named):
        inject_at("metadata")
        plain_finish(self, *arguments, **named)

    MemDLMTrainer.train_step, Objective.loss_sum, EpochLoader._read = train_step, loss_sum, read
    BatchPrefetcher._load, Predictor.generate = load, generate
    ResumableCheckpoints.dcp_save = dcp_save
    LLaDAStateDictAdapter.to_hf = to_hf
    hugging_face_folder.export, hugging_face_folder.consolidate_safetensors = export, consolidate
    FileSystemWriter.write_data, FileSystemWriter.finish = write_data, finish


if __name__ == "__main__":
    os.environ.setdefault("RANK", "0")
    inject(json.loads(sys.argv[1]))
    preemption.ignore_outside_of_training()  # as memdlm_dist.train does
    sys.exit(train.main(sys.argv[2:]))
