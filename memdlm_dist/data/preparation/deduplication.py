"""Removal of exact duplicates: rows with the text of an earlier row are dropped.

First every unit writes a hash of each of its rows. Then the hashes of all units are compared, in several rounds that
take one share of all hash values each, which bounds the memory. The first copy in the order of the corpus stays.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data import sequences
from memdlm_dist.data.corpus import Row
from memdlm_dist.data.preparation import units
from memdlm_dist.data.preparation.jobs import Job, ProgressMark
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.sequence_builder import errors_as_bad_rows
from memdlm_dist.data.preparation.units import Unit
from memdlm_dist.data.preparation.work_folder import WorkFolder, outages_explained
from memdlm_dist.data.sequences import BadRow
from memdlm_dist.errors import UserError

HASH_BYTES = 16
ROUND = 1 << 26  # rows compared at once; a row takes about 60 bytes of memory
_NO_HASH = bytes(HASH_BYTES)  # of a bad row, which is no duplicate
_DONE = "duplicates.json"


def _hashes_name(unit: int) -> str:
    return f"{unit:06d}.hashes"


def _duplicates_name(unit: int) -> str:
    return f"{unit:06d}.duplicates"


def row_hash(row: Row, config: PrepareConfig) -> bytes:
    """Return a 128-bit hash of a row's text; zeros for a bad row.

    Rows of the same text are duplicates, whatever their other fields.
    """
    if row.problem is not None:
        return _NO_HASH
    row_format = config.row_format or sequences.detect_format(row.values, config.fields)
    state = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with errors_as_bad_rows():
            if row_format == "text":
                parts = [("", sequences.document(row.values, config.fields))]
            else:
                messages = sequences.conversation(row.values, row_format or "messages", config.fields)
                parts = [(message["role"], message["content"]) for message in messages]
    except BadRow:
        return _NO_HASH
    for role, text in parts:
        # The lengths keep ("a", "bc") and ("ab", "c") apart.
        content = text.encode()
        state.update(f"{role} {len(content)} ".encode() + content)
    return state.digest()


def hash_unit(job: Job) -> None:
    """Write the hashes of a unit's rows.

    Raises:
        UserError: if the corpus cannot be read.
    """
    job.begin()
    work = WorkFolder(*job.work)
    hashes = bytearray()
    with ProgressMark(job.scratch, job.unit.number) as mark:
        for row, offset in units.rows(job.unit):
            if job.config.limit is not None and len(hashes) >= job.config.limit * HASH_BYTES:
                break
            hashes += row_hash(row, job.config)
            mark.update(offset, 0)
    job.check_parent()
    with outages_explained(work.location):
        work.storage.write(work.path(_hashes_name(job.unit.number)), bytes(hashes))


def without_hashes(work: WorkFolder, all_units: Sequence[Unit]) -> list[Unit]:
    """Return the units whose hashes are not written yet; none if the duplicates are known."""
    names = work.names()
    return [] if _DONE in names else [unit for unit in all_units if _hashes_name(unit.number) not in names]


def find_duplicates(work: WorkFolder, all_units: Sequence[Unit]) -> None:
    """Compare the hashes of all units, and write for each unit which of its rows are duplicates.

    Raises:
        UserError: if the hashes of a unit are missing.
    """
    if _DONE in work.names():
        return
    if missing := without_hashes(work, all_units):
        raise UserError(
            f"The hashes of {len(missing)} of {len(all_units)} units are missing, the first of unit {missing[0]}; run "
            "all partitions with --hash-only first."
        )
    sizes = work.storage.sizes(work.path("")[:-1])
    rows = sum((sizes[_hashes_name(unit.number)] or 0) // HASH_BYTES for unit in all_units)
    rounds = -(-rows // ROUND) or 1
    duplicates: list[list[NDArray[np.int64]]] = [[] for _ in all_units]
    for number in range(rounds):
        found = [_of_round(work, unit.number, number, rounds) for unit in all_units]
        is_duplicate = _repeated(np.concatenate([values for values, _ in found]))
        start = 0
        for unit_duplicates, (_, numbers) in zip(duplicates, found, strict=True):
            unit_duplicates.append(numbers[is_duplicate[start : start + len(numbers)]])
            start += len(numbers)
    for unit, parts in zip(all_units, duplicates, strict=True):
        numbers = np.sort(np.concatenate(parts)).astype("<u8")
        work.storage.write(work.path(_duplicates_name(unit.number)), numbers.tobytes())
    work.storage.write_json(work.path(_DONE), {"rows": rows})


def _of_round(work: WorkFolder, unit: int, number: int, rounds: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of a unit's rows that belong to a round, `[n, 2]`, and the rows' numbers, `[n]`."""
    values = np.frombuffer(work.storage.read(work.path(_hashes_name(unit))), "<u8").reshape(-1, 2)
    rows = np.flatnonzero((values[:, 0] % rounds == number) & values.any(-1))
    return values[rows], rows


def _repeated(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each of the hashes `[n, 2]` whether an earlier one is equal to it."""
    order = np.lexsort((values[:, 1], values[:, 0]))  # stable: equal hashes stay in the order of the corpus
    ordered = values[order]
    repeated = np.zeros(len(values), dtype=np.bool_)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(-1)
    return repeated


def read_duplicates(work: WorkFolder, unit: int) -> frozenset[int]:
    """Return the numbers of a unit's rows, from 0 on, that are duplicates of earlier rows."""
    return frozenset(np.frombuffer(work.storage.read(work.path(_duplicates_name(unit))), "<u8").tolist())
