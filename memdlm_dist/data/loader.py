"""Shards to micro-batches: mosaicml-streaming, in an order that does not depend on the number of ranks."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from streaming import StreamingDataLoader
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import default_collate

from memdlm_dist.compat import streaming
from memdlm_dist.data.dataset import MISTAKE, Requirements, TokenDataset, check_cards, open_dataset
from memdlm_dist.data.settings import Data
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.preemption import outlive_first_sigterm, starting_workers


class Batch(NamedTuple):
    """The rows of a micro-batch, all int64."""

    tokens_BL: Tensor
    labels_BL: Tensor  # the tokens that may be masked, -100 elsewhere
    sample_ids_B: Tensor
    documents_BL: Tensor | None  # where the rows know theirs
    position: dict[str, int]  # of the loader behind them


class EpochLoader(Stateful):
    """Micro-batches for ever, epoch after epoch; its state is a position in samples, the same on every rank.

    An epoch is read in whole global batches, its incomplete last one is left out: so that the n-th optimizer step
    reads the same samples on any number of ranks, with any micro-batch and any number of workers.

    It may read ahead of training: whoever uses a batch then sets `position` to the batch's, which checkpoints have.

    Args:
        dataset: with `batch_size` for its own.
        batch_size: sequences per rank and micro-batch.
        ranks: data-parallel ones.
        global_batch_size: sequences per optimizer step.
        most_documents: of a row, from `check_cards`.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        ranks: int,
        global_batch_size: int,
        most_documents: int | None = 0,
        **options: Any,
    ):
        if not options.get("num_workers"):
            options = {k: v for k, v in options.items() if k not in ("persistent_workers", "prefetch_factor")}
        # Shapes stay fixed on every rank.
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=batch_size,
            drop_last=True,
            worker_init_fn=_start_worker,
            collate_fn=_collate,
            **options,
        )
        self._dataset, self._micro_batch = dataset, batch_size * ranks
        self.global_batch_size, self.most_documents = global_batch_size, most_documents
        self.fingerprint = dataset.fingerprint()
        # Of all ranks together; the number of nodes is that of the first start (streaming's elasticity asks for it).
        self.position = {"epoch": 0, "samples": 0, "nodes": streaming.num_nodes(dataset)}
        self.before_workers: Callable[[], None] = lambda: None  # called before worker processes are forked

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from `position` on."""
        position = dict(self.position)
        upcoming = 0  # the epoch that streaming reads next by itself
        while True:
            left = self._dataset.epoch_size - position["samples"]
            end = position["samples"] + left // self.global_batch_size * self.global_batch_size
            if end > position["samples"]:
                if (position["epoch"], position["samples"]) != (upcoming, 0):
                    self._seek(position)
                upcoming = position["epoch"] + 1
                for rows in self._read():
                    # What is left of the epoch is read as well, less than a step: the workers come to its end.
                    if position["samples"] < end:
                        position["samples"] += self._micro_batch
                        yield Batch(
                            rows["tokens"], rows["labels"], rows["sample_id"], rows.get("documents"), dict(position)
                        )
            position |= _beginning_of_next(position)

    def _read(self) -> Iterator[dict[str, Tensor]]:
        if self._loader.num_workers:
            self.before_workers()
        batches = iter(self._loader)
        with starting_workers():
            first = next(batches, None)
        for batch in chain(() if first is None else (first,), batches):
            if MISTAKE in batch:
                raise UserError(batch[MISTAKE][0])
            yield batch

    def _seek(self, position: dict[str, int]) -> None:
        """Let streaming, on this rank and in its workers, begin to read at a position."""
        self._dataset.load_state_dict(
            {
                "epoch": position["epoch"],
                "sample_in_epoch": position["samples"],
                "num_canonical_nodes": self._dataset.num_canonical_nodes,
                "shuffle_seed": self._dataset.shuffle_seed,
                "initial_physical_nodes": position["nodes"],
            }
        )

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.position |= _beginning_of_next(self.position)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position |= state_dict


def _beginning_of_next(position: dict[str, int]) -> dict[str, int]:
    return {"epoch": position["epoch"] + 1, "samples": 0}


def _start_worker(worker: int) -> None:
    del worker
    outlive_first_sigterm()


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    mistakes = [sample[MISTAKE] for sample in samples if MISTAKE in sample]
    return {MISTAKE: mistakes} if mistakes else default_collate(samples)


def training_loader(
    data: Data,
    run: Requirements,
    *,
    local_batch_size: int,
    global_batch_size: int,
    ranks: int,
    world_size: int,
    **options: Any,
) -> EpochLoader:
    """Open the training loader of one rank.

    Args:
        ranks: data-parallel ones; streaming reads this rank's number from the environment.
        options: of torch's DataLoader.

    Raises:
        UserError: if the shards are missing, do not fit the run, or are too few.
    """
    most_documents = check_cards(data.train, run)
    dataset = open_dataset(
        data,
        data.train,
        data.proportions,
        batch_size=local_batch_size,
        documents=most_documents != 0,
        shuffle=data.shuffle,
        shuffle_seed=data.shuffle_seed,
        num_canonical_nodes=data.num_canonical_nodes,
        # Consecutive ranks, those of a context-parallel and a tensor-parallel group, get the same samples.
        replication=world_size // ranks,
    )
    if dataset.epoch_size < global_batch_size:
        raise UserError(
            f"data.train holds {dataset.epoch_size} sequences, fewer than one global batch of {global_batch_size}; "
            "prepare more data, or lower training.global_batch_size or training.local_batch_size."
        )
    return EpochLoader(dataset, local_batch_size, ranks, global_batch_size, most_documents, **options)
