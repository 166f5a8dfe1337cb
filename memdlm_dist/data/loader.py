"""Data loader over mosaicml-streaming shards; its order does not depend on the number of ranks."""

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from streaming import StreamingDataLoader
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import default_collate

from memdlm_dist.compat import streaming
from memdlm_dist.data.dataset import ERROR_KEY, TokenDataset, open_dataset
from memdlm_dist.data.row_lengths import TokenShares
from memdlm_dist.data.row_shape import UNIFORM, Requirements, RowShape, check_cards, group_size
from memdlm_dist.data.settings import Data
from memdlm_dist.data.stream_shares import StreamShare
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.preemption import outlive_first_sigterm, starting_workers
from memdlm_dist.runtime.rank_0 import is_rank_0

logger = logging.getLogger()


class Batch(NamedTuple):
    """One micro-batch of one data-parallel rank; all tensors are int64."""

    tokens_BL: Tensor
    labels_BL: Tensor  # tokens at maskable positions, -100 elsewhere
    sample_ids_B: Tensor
    documents_BL: Tensor | None  # document number of each token; None if rows neither are packed nor differ in length
    position: dict[str, int]  # of the loader after this micro-batch


class EpochLoader(Stateful):
    """Endless loader of micro-batches, epoch after epoch; its state is a position in samples, equal on all ranks.

    An epoch consists of complete global batches, without the incomplete last one. The n-th optimizer step therefore
    reads the same samples with any number of ranks, any micro-batch size and any number of workers. The same is true of
    the dataset's groups, and each lies in one micro-batch.

    The loader may be read ahead of training. The trainer sets `position` to the position of each batch that it trains
    on, and checkpoints save that value.

    Args:
        dataset: must have the same `batch_size`.
        batch_size: rows per data-parallel rank and micro-batch.
        dp_size: number of data-parallel ranks.
        global_batch_size: rows per optimizer step.
        rows: shape of the rows, from `check_cards`.
        options: passed on to torch's DataLoader.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        dp_size: int,
        global_batch_size: int,
        rows: RowShape = UNIFORM,
        **options: Any,
    ):
        if not options.get("num_workers"):
            options = {k: v for k, v in options.items() if k not in ("persistent_workers", "prefetch_factor")}
        # drop_last keeps the shapes of batches fixed on every rank.
        self._loader = StreamingDataLoader(
            dataset,
            batch_size=batch_size,
            drop_last=True,
            worker_init_fn=_start_worker,
            collate_fn=_collate,
            **options,
        )
        self._dataset, self._global_micro_batch_size = dataset, batch_size * dp_size
        self.global_batch_size, self.rows = global_batch_size, rows
        self.fingerprint = dataset.fingerprint()
        if dataset.group_size > 1 and dataset.num_canonical_nodes > 1 and not rows.buckets:
            self.fingerprint += f" in groups of {dataset.group_size}"  # the order depends on them
        # Samples are counted over all ranks. "nodes" is the number of nodes at the run's first start, which streaming
        # needs in order to keep the sample order on another number of nodes.
        self.position = {"epoch": 0, "samples": 0, "nodes": streaming.num_nodes(dataset)}
        self.before_workers: Callable[[], None] = lambda: None  # hook, called before worker processes are forked

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch; the incomplete last global batch is none."""
        return self._dataset.epoch_size // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield micro-batches without end, starting at `position`."""
        position = dict(self.position)
        # After an accepted change of the global batch size the position may lie inside a group, whose first rows have
        # been read. Its other rows are skipped, so that no row is read twice.
        position["samples"] += -position["samples"] % self._dataset.group_size
        upcoming = 0  # the epoch that streaming reads next without `_seek`
        while True:
            left = self._dataset.epoch_size - position["samples"]
            end = position["samples"] + left // self.global_batch_size * self.global_batch_size
            if end > position["samples"]:
                if (position["epoch"], position["samples"]) != (upcoming, 0):
                    self._seek(position)
                upcoming = position["epoch"] + 1
                for rows in self._read():
                    # The rest of the epoch, less than one step, is read and dropped, so that the workers finish it.
                    if position["samples"] < end:
                        position["samples"] += self._global_micro_batch_size
                        yield Batch(
                            rows["tokens"], rows["labels"], rows["sample_id"], rows.get("documents"), dict(position)
                        )
            position |= _next_epoch_start(position)

    def _read(self) -> Iterator[dict[str, Tensor]]:
        if self._loader.num_workers:
            self.before_workers()
        batches = iter(self._loader)
        with starting_workers():
            first = next(batches, None)
        for batch in chain(() if first is None else (first,), batches):
            if ERROR_KEY in batch:
                raise UserError(batch[ERROR_KEY][0])
            yield batch

    def _seek(self, position: dict[str, int]) -> None:
        """Make streaming start its next epoch at `position`, on this rank and in its workers."""
        self._dataset.load_state_dict(
            {
                "epoch": position["epoch"],
                "sample_in_epoch": position["samples"],
                "num_canonical_nodes": self._dataset.num_canonical_nodes,
                "shuffle_seed": self._dataset.shuffle_seed,
                "initial_physical_nodes": position["nodes"],
            }
        )

    def token_shares(self) -> TokenShares | None:
        """Count content, padding and fill of an epoch; None if all rows have one length."""
        return self._dataset.token_shares(self._global_micro_batch_size) if self.rows.buckets else None

    def stream_shares(self) -> list[StreamShare]:
        """Return the share of each stream in an epoch."""
        return self._dataset.stream_shares()

    def next_epoch(self) -> None:
        """Move `position` to the start of the next epoch."""
        self.position |= _next_epoch_start(self.position)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the last batch that was trained on."""
        return dict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position; the next iteration starts there."""
        self.position |= state_dict


def _next_epoch_start(position: dict[str, int]) -> dict[str, int]:
    return {"epoch": position["epoch"] + 1, "samples": 0}


def _start_worker(worker: int) -> None:
    del worker
    outlive_first_sigterm()


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [sample[ERROR_KEY] for sample in samples if ERROR_KEY in sample]
    return {ERROR_KEY: errors} if errors else default_collate(samples)


def training_loader(
    data: Data,
    run: Requirements,
    *,
    local_batch_size: int,
    global_batch_size: int,
    dp_size: int,
    world_size: int,
    samples_per_set: int = 1,
    **options: Any,
) -> EpochLoader:
    """Open the training loader of this rank, whose number streaming reads from the environment.

    Args:
        dp_size: number of data-parallel ranks.
        samples_per_set: consecutive samples that share fast weights; the rows of a group stay together in one
            micro-batch of one rank.
        options: passed on to torch's DataLoader.

    Raises:
        UserError: if the shards are missing, do not fit the run, or hold fewer rows than one global batch; or if a
            micro-batch does not hold whole groups.
    """
    rows = check_cards(data.train, run)
    if data.group_by_length and not rows.buckets and is_rank_0():
        logger.warning(
            "data.group_by_length has no effect, because all rows of data.train have one length; prepare fine-tuning "
            "data without --pad-to-length and --pack-documents, or unset it."
        )
    size = group_size(rows, samples_per_set, "data.train", "training.local_batch_size", local_batch_size)
    dataset = open_dataset(
        data,
        data.train,
        data.proportions,
        rows,
        batch_size=local_batch_size,
        global_batch_size=global_batch_size,
        group_size=size,
        group_by_length=data.group_by_length,
        mask_prompt=data.mask_prompt,
        shuffle=data.shuffle,
        shuffle_seed=data.shuffle_seed,
        num_canonical_nodes=data.num_canonical_nodes,
        # Consecutive ranks form a context-parallel and tensor-parallel group and read the same samples.
        replication=world_size // dp_size,
    )
    if dataset.epoch_size < global_batch_size:
        raise UserError(
            f"data.train holds {dataset.epoch_size} sequences, fewer than one global batch of {global_batch_size}; "
            "prepare more data, or lower training.global_batch_size or training.local_batch_size."
        )
    return EpochLoader(dataset, local_batch_size, dp_size, global_batch_size, rows, **options)
