"""Text that a tokenizer is trained on: the beginning of every segment of the corpus, in proportion to its size."""

from collections.abc import Iterator, Sequence

from memdlm_dist.data.preparation import units, workers
from memdlm_dist.data.preparation.jobs import Job, ProgressMark
from memdlm_dist.data.preparation.progress import Progress
from memdlm_dist.data.preparation.sequence_builder import training_text
from memdlm_dist.data.preparation.units import Unit


def texts(jobs: Sequence[Job], n_workers: int, cluster: str | None) -> Iterator[str]:
    """Yield a sample of at most about `tokenizer_sample` bytes of text, read in parallel, in the order of the corpus.

    A segment's part of the sample is in proportion to its stored size. Bad and held-out rows are left out.
    """
    total = sum(job.unit.size for job in jobs)
    # Bytes of text for each stored byte. Text that was stored compressed may be longer than that.
    share = jobs[0].config.tokenizer_sample / max(total, 1)
    # The sample depends neither on the number of workers nor on the order in which they end.
    parts: dict[int, list[str]] = {}
    expected = 0
    with Progress("Reading the sample for the tokenizer", total, jobs[0].scratch) as progress:
        for job, found in workers.results(_Sample(share), jobs, n_workers, cluster):
            progress.finish_unit(job.unit.size, 0)
            parts[job.unit.number] = found
            while expected in parts:
                yield from parts.pop(expected)
                expected += 1


class _Sample:
    """Reader of one unit's share of the sample."""

    def __init__(self, share: float):
        self._share = share

    def __call__(self, job: Job) -> list[str]:
        job.begin()
        found: list[str] = []
        rows = before = 0
        with ProgressMark(job.scratch, job.unit.number) as mark:
            for segment in job.unit.segments:
                size, largest = 0, self._share * segment.size if segment.size else job.config.tokenizer_sample
                for row, offset in units.rows(Unit(0, (segment,))):
                    if rows == job.config.limit or size >= largest:
                        break
                    rows += 1
                    mark.update(before + offset, 0)
                    if row.problem is None and (text := training_text(row, job.config)):
                        found.append(text)
                        size += len(text.encode())
                before += segment.size
        return found
