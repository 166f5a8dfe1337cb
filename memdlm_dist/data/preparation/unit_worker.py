"""Preparation of one unit in a worker process: read, tokenise, pack, write shards, record what is finished."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data.corpus import Row
from memdlm_dist.data.output import SPLITS, TOKENIZER
from memdlm_dist.data.preparation import deduplication, units
from memdlm_dist.data.preparation.jobs import Job, ProgressMark
from memdlm_dist.data.preparation.record import Record, part_name
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.sequence_builder import SequenceBuilder, batches
from memdlm_dist.data.preparation.summary import Summary
from memdlm_dist.data.preparation.work_folder import WorkFolder, outages_explained, unwritable
from memdlm_dist.data.shards import ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage, StoreError, is_remote

_NONE = np.empty(0, dtype=np.uint64)


def prepare_unit(job: Job) -> list[Record]:
    """Prepare the parts of a unit that are not finished yet, and return the records of all parts.

    Raises:
        UserError: if the corpus cannot be read, shards cannot be written, or with `strict` for the first bad row.
    """
    job.begin()
    work = WorkFolder(*job.work)
    with outages_explained(work.location), ProgressMark(job.scratch, job.unit.number) as mark:
        records = work.records(job.unit.number)
        damaged = next((i for i, record in enumerate(records) if not work.is_intact(record)), len(records))
        records = records[:damaged]
        if records and records[-1].last:
            return records
        duplicates = deduplication.read_duplicates(work, job.unit.number) if job.config.deduplicate else _NONE
        rows = _Rows(job, sum(record.summary.rows for record in records), duplicates, mark)
        while not (records and records[-1].last):
            records.append(_prepare_part(job, work, rows, len(records)))
        return records


class _Rows:
    """Rows of a unit, cut into parts of about `unit_size` bytes if the unit is a stream."""

    def __init__(self, job: Job, first: int, duplicates: NDArray[np.uint64], mark: ProgressMark):
        self._job, self._number, self._mark = job, first, mark
        self._duplicates = duplicates[np.searchsorted(duplicates, first) :]  # from the next row on
        self._next_duplicate = 0
        self._rows = units.rows(job.unit, first)
        self._next = next(self._rows, None)
        self._limit = job.config.limit

    @property
    def at_end(self) -> bool:
        """True if no row is left."""
        return self._next is None or (self._limit is not None and self._number >= self._limit)

    def part(self, summary: Summary, report: Callable[[str, str], None]) -> Iterator[Row]:
        """Yield the good rows of the next part, and count its rows."""
        size = 0
        while not self.at_end and not (self._job.unit.is_stream and size >= self._job.config.unit_size):
            assert self._next is not None
            row, offset = self._next
            self._mark.update(offset, summary.bad_rows)
            if self._is_duplicate():
                summary.duplicates += 1
            elif row.problem is not None:
                report(row.location, row.problem)
            else:
                yield row
            summary.rows += 1
            size += row.size
            self._number += 1
            self._next = next(self._rows, None)

    def _is_duplicate(self) -> bool:
        """Return whether the present row is a duplicate, and go on to the next duplicate."""
        found = self._next_duplicate < len(self._duplicates)
        found = found and int(self._duplicates[self._next_duplicate]) == self._number
        self._next_duplicate += found
        return found


def _report(config: PrepareConfig, summary: Summary, location: str, problem: str) -> None:
    problem = summary.add_bad_row(location, problem)
    if config.strict:
        raise UserError(f"Bad row at {location}: {problem}; correct the row, or omit --strict to skip bad rows.")


def _prepare_part(job: Job, work: WorkFolder, rows: _Rows, number: int) -> Record:
    name, summary = part_name(job.unit.number, number), Summary()
    report = partial(_report, job.config, summary)
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=job.scratch, prefix=f"{name}-"))

    def publish(split: str, shard: Path) -> None:
        job.check_parent()
        work.check_not_discarded()
        try:
            work.storage.take(shard, f"{work.staged(split)}/{name}/{shard.name}")
        except Exception as error:  # each remote file system has different error classes
            raise unwritable(job.config.output, error) from None

    try:
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(ShardWriter(folder / split, job.card, publish=partial(publish, split)))
                for split in SPLITS
            }
            builder = SequenceBuilder(
                job.config, _tokenizer(job.tokenizer, job.scratch, work.fingerprint), summary, report
            )
            for batch in batches(rows.part(summary, report)):
                for split, sequence in builder.add(batch):
                    writers[split].write(sequence)
            for split, sequence in builder.finish():
                writers[split].write(sequence)
        summary.sequences = {split: writer.card.sequences for split, writer in writers.items()}
        shares = {split: writer.shares() for split, writer in writers.items()}
        summary.padding = {split: counts for split, counts in shares.items() if counts.padding}
        record = Record(
            job.unit.number,
            number,
            rows.at_end,
            summary,
            {split: writer.shards for split, writer in writers.items() if writer.shards},
            {split: writer.card.most_documents for split, writer in writers.items()},
            {split: np.array(writer.lengths) for split, writer in writers.items() if writer.lengths},
        )
        job.check_parent()
        work.check_not_discarded()
        try:
            work.write(record)
        except Exception as error:  # each remote file system has different error classes
            raise unwritable(job.config.output, error) from None
        return record
    except StoreError:
        raise  # of the output, not of the scratch folder
    except OSError as error:
        raise UserError(
            f"The folder {job.scratch} cannot be written to ({one_line(error)}); free space there, or choose another "
            "--scratch. Finished units are kept: the same command goes on from there."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _tokenizer(location: str, scratch: str, fingerprint: str) -> DiffusionTokenizer:
    """Load a tokenizer; one in a store is copied to the scratch folder first.

    Args:
        fingerprint: of the plan; another plan may have another tokenizer at the same location.
    """
    if not is_remote(location):
        return DiffusionTokenizer(location)
    storage = Storage(location)
    folder = tempfile.mkdtemp(dir=scratch, prefix=f"{TOKENIZER}-{fingerprint}-")
    for name in storage.sizes():
        Path(folder, name).write_bytes(storage.read(name))
    return DiffusionTokenizer(folder)
