"""Shards to micro-batches: mosaicml-streaming, in an order that does not depend on the number of ranks."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from streaming import StreamingDataLoader
from torchtitan.components.dataloader import BaseDataLoader

from memdlm_dist.compat import streaming
from memdlm_dist.data.dataset import TokenDataset, check_cards, open_dataset
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.preemption import outlive_first_sigterm, starting_workers

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class EpochLoader(BaseDataLoader):
    """Micro-batches for ever, epoch after epoch; its state is a position in samples, the same on every rank.

    An epoch is read in whole global batches, its incomplete last one is left out: so that the n-th optimizer step
    reads the same samples on any number of ranks, with any micro-batch and any number of workers.

    Yields `({"input": tokens [B, L], "sample_id": [B]}, labels [B, L])`, all int64; with "documents" [B, L] where the
    rows know theirs.

    Args:
        dataset: with `batch_size` for its own.
        batch_size: sequences per rank and micro-batch.
        ranks: data-parallel ones.
        global_batch_size: sequences per optimizer step.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, ranks: int, global_batch_size: int, **options: Any):
        if not options.get("num_workers"):
            options = {k: v for k, v in options.items() if k not in ("persistent_workers", "prefetch_factor")}
        # Shapes stay fixed on every rank.
        self._loader = StreamingDataLoader(
            dataset, batch_size=batch_size, drop_last=True, worker_init_fn=_start_worker, **options
        )
        self._dataset, self._micro_batch = dataset, batch_size * ranks
        self.global_batch_size = global_batch_size
        self.fingerprint = dataset.fingerprint()
        # Of all ranks together; the number of nodes is that of the first start (streaming's elasticity asks for it).
        self._position = {"epoch": 0, "samples": 0, "nodes": streaming.nodes(dataset)}

    def __iter__(self) -> Iterator[Batch]:
        position = self._position
        upcoming = 0  # the epoch that streaming reads next by itself
        while True:
            left = self._dataset.epoch_size - position["samples"]
            end = position["samples"] + left // self.global_batch_size * self.global_batch_size
            if end > position["samples"]:
                if (position["epoch"], position["samples"]) != (upcoming, 0):
                    self._seek()
                upcoming = position["epoch"] + 1
                for batch in self._read():
                    # What is left of the epoch is read as well, less than a step: the workers come to its end.
                    if position["samples"] < end:
                        position["samples"] += self._micro_batch
                        labels = batch.pop("labels")
                        yield {"input": batch.pop("tokens"), **batch}, labels
            self.next_epoch()

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            batches = iter(self._loader)
            with starting_workers():
                first = next(batches, None)
            if first is not None:
                yield first
                yield from batches
        except UserError as error:
            # A worker's exception arrives with its traceback as text; its last line is the sentence.
            message = str(error).strip().splitlines()[-1].removeprefix("memdlm_dist.errors.UserError: ")
            raise UserError(message) from None

    def _seek(self) -> None:
        """Let streaming, on this rank and in its workers, begin to read where we are."""
        self._dataset.load_state_dict(
            {
                "epoch": self._position["epoch"],
                "sample_in_epoch": self._position["samples"],
                "num_canonical_nodes": self._dataset.num_canonical_nodes,
                "shuffle_seed": self._dataset.shuffle_seed,
                "initial_physical_nodes": self._position["nodes"],
            }
        )

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self._position |= {"epoch": self._position["epoch"] + 1, "samples": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position |= state_dict


def _start_worker(worker: int) -> None:
    del worker
    outlive_first_sigterm()


def build_dataloader(
    *, dp_world_size: int, dp_rank: int, tokenizer: DiffusionTokenizer, job_config: Any
) -> EpochLoader:
    """The training loader of one rank.

    Raises:
        UserError: if the shards are missing, do not fit the configuration, or are too few.
    """
    del dp_rank  # streaming reads the rank from the environment
    data, training = job_config.data, job_config.training
    documents = check_cards(job_config, data.train, tokenizer)
    dataset = open_dataset(
        job_config,
        data.train,
        data.proportions,
        batch_size=training.local_batch_size,
        documents=documents,
        shuffle=data.shuffle,
        shuffle_seed=data.shuffle_seed,
        num_canonical_nodes=data.num_canonical_nodes,
        # Consecutive ranks, those of a context-parallel and a tensor-parallel group, get the same samples.
        replication=int(os.environ.get("WORLD_SIZE", "1")) // dp_world_size,
    )
    global_batch = training.global_batch_size
    if global_batch < 0:
        global_batch = training.local_batch_size * dp_world_size
    if dataset.epoch_size < global_batch:
        raise UserError(
            f"data.train holds {dataset.epoch_size} sequences, fewer than one global batch of {global_batch}; prepare "
            "more data, or lower training.global_batch_size or training.local_batch_size."
        )
    workers = training.dataloader
    return EpochLoader(
        dataset,
        training.local_batch_size,
        dp_world_size,
        global_batch,
        num_workers=workers.num_workers,
        persistent_workers=workers.persistent_workers,
        prefetch_factor=workers.prefetch_factor,
        pin_memory=workers.pin_memory,
    )
