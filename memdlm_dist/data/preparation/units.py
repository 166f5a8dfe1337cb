"""Units of a corpus: parts that are prepared independently, in any order, by any number of workers.

The units depend on the input and on the unit size alone, and so do their shards.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from memdlm_dist.data import corpus, hub_dataset, output
from memdlm_dist.data.corpus import Row, Segment, Source
from memdlm_dist.data.hub_dataset import HubSource
from memdlm_dist.data.output import SPLITS, SUMMARY, TOKENIZER
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.work_folder import FOLDER
from memdlm_dist.errors import require
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.storage import is_remote
from memdlm_dist.runtime.writer import LEASE

_FOOTERS = 16  # Parquet files whose description is read at the same time
# Parquet files smaller than this share of a unit are not cut, so that their description need not be read. Few are
# compressed to less.
_SMALL_PARQUET = 8
_MAX_UNITS = 10_000_000


@dataclass(frozen=True)
class Unit:
    """Consecutive segments of the corpus that one worker prepares.

    Attributes:
        number: in the order of the corpus, from 0 on.
    """

    number: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes as stored."""
        return sum(segment.size for segment in self.segments)

    @property
    def is_stream(self) -> bool:
        """True if the length of the text is not known in advance; such a unit is written in several parts."""
        return any(segment.is_stream for segment in self.segments)

    def __str__(self) -> str:
        first, last = (segment.source.url for segment in (self.segments[0], self.segments[-1]))
        return f"{self.number} ({first}{'' if first == last else f' to {last}'})"


def sources(config: PrepareConfig) -> list[Source]:
    """Find the files and the datasets of the hub that the inputs name, in their order.

    Raises:
        UserError: if an input cannot be found or accessed.
    """
    if not config.inputs:
        return corpus.builtin_sources()
    found: list[Source] = []
    for name in config.inputs:
        repository = hub.parse(name)
        if repository is None:
            found += [file for file in corpus.sources([name]) if not _is_own(file.url, str(config.output))]
        else:
            found.append(hub_dataset.load(repository, config.split, config.subset))
    return found


def _is_own(url: str, output_location: str) -> bool:
    """Return whether a file is one that a preparation writes to its output, which may lie in a folder of inputs."""
    root = output_location.rstrip("/") if is_remote(output_location) else os.path.realpath(output_location)
    path = url if is_remote(url) else os.path.realpath(url)
    if not path.startswith(f"{root}/"):
        return False
    first, _, rest = path.removeprefix(f"{root}/").partition("/")
    folders = {*SPLITS, TOKENIZER}
    return first in ({*folders, *map(output.staged_name, folders), FOLDER} if rest else {SUMMARY, LEASE})


def cut(files: Sequence[Source], unit_size: int) -> list[Unit]:
    """Cut a corpus into units of about `unit_size` bytes.

    A file is cut at row boundaries if parts of it can be read; consecutive small files share a unit.

    Raises:
        UserError: if the description of a Parquet file cannot be read, or there would be too many units.
    """
    size = sum(file.size or 0 for file in files)
    require(
        size <= _MAX_UNITS * unit_size,
        f"--unit-size {unit_size:,} would cut the {size:,} bytes of the input into more than {_MAX_UNITS:,} units; "
        "give a larger size, such as 64mb.",
    )
    cuttable = [file for file in files if corpus.is_parquet(file) and (file.size or 0) * _SMALL_PARQUET > unit_size]
    with ThreadPoolExecutor(_FOOTERS) as pool:
        row_groups = {
            f.url: sizes for f, sizes in zip(cuttable, pool.map(corpus.row_group_sizes, cuttable), strict=True)
        }
    units: list[list[Segment]] = []
    room = -1  # bytes that the last unit can take in; negative if it takes in no file
    for file in files:
        segments = list(_segments(file, row_groups.get(file.url), unit_size))
        if len(segments) == 1 and file.size is not None and file.size <= room:
            units[-1] += segments
            room -= file.size
        else:
            units += [[segment] for segment in segments]
            room = unit_size - file.size if len(segments) == 1 and file.size is not None else -1
    return [Unit(number, tuple(segments)) for number, segments in enumerate(units)]


def whole(files: Sequence[Source]) -> list[Unit]:
    """Return the corpus as one unit."""
    return [Unit(0, tuple(Segment(file, file.size or 0) for file in files))]


def _segments(file: Source, row_groups: list[int] | None, unit_size: int) -> Iterator[Segment]:
    stored = file.size or 0
    if isinstance(file, HubSource):
        rows, parts = len(file.dataset), max(-(-stored // unit_size), 1)
        borders = sorted({rows * i // parts for i in range(parts + 1)})
        for start, end in pairwise(borders) if rows else [(0, 0)]:
            yield Segment(file, stored * (end - start) // max(rows, 1), start, end)
    elif row_groups:
        total = max(sum(row_groups), 1)
        start = size = 0
        for end, group in enumerate(row_groups, start=1):
            size += group
            if size >= unit_size or end == len(row_groups):
                yield Segment(file, stored * size // total, start, end)
                start, size = end, 0
    elif corpus.can_be_cut(file) and stored > unit_size:
        for start in range(0, stored, unit_size):
            end = min(start + unit_size, stored)
            yield Segment(file, end - start, start, end)
    else:
        yield Segment(file, stored)


def rows(unit: Unit, skip: int = 0) -> Iterator[tuple[Row, int]]:
    """Yield the rows of a unit, each with the number of stored bytes of the unit that have been read.

    Args:
        skip: number of rows at the beginning that are not yielded.

    Raises:
        UserError: if a file cannot be read, or has changed since the units were cut.
    """
    before = 0
    for segment in unit.segments:
        if isinstance(segment.source, HubSource):
            found = hub_dataset.rows(segment)
        else:
            corpus.check_unchanged(segment.source)
            found = corpus.rows(segment, skip)
        for row in found:
            if skip:
                skip -= 1
            else:
                yield row, before + row.offset
        if not isinstance(segment.source, HubSource):
            corpus.check_unchanged(segment.source)
        before += segment.size
