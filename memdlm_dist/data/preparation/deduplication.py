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
from memdlm_dist.errors import UserError, require

HASH_BYTES = 16
ROUND = 1 << 26  # rows compared at once; each takes about 70 bytes of memory
_NO_HASH = bytes(HASH_BYTES)  # of a bad row, which is no duplicate
_DONE = "duplicates.json"


def _hashes_name(unit: int) -> str:
    return f"{unit:06d}.hashes"


def _duplicates_name(unit: int) -> str:
    return f"{unit:06d}.duplicates"


def row_hash(row: Row, config: PrepareConfig) -> bytes:
    """Return a 128-bit hash of the text that training would see of a row; zeros for a bad row.

    Rows of the same text are duplicates, whatever their other fields.
    """
    if row.problem is not None:
        return _NO_HASH
    row_format = config.row_format or sequences.detect_format(row.values, config.fields)
    state = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with errors_as_bad_rows():
            if row_format == "text":
                parts = ["text", sequences.document(row.values, config.fields)]
            elif config.chat_template is not None:
                messages = sequences.conversation(row.values, row_format or "messages", config.fields)
                parts = [text for message in messages for text in (message["role"], message["content"])]
            else:
                pairs = sequences.segments(row.values, row_format or "messages", config.fields)
                parts = [part for text, is_response in pairs for part in (str(is_response), text)]
    except BadRow:
        return _NO_HASH
    for part in parts:
        content = part.encode()
        state.update(len(content).to_bytes(8, "little") + content)  # the length keeps (a, bc) and (ab, c) apart
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
        _write(work, _hashes_name(job.unit.number), bytes(hashes))


def _write(work: WorkFolder, name: str, content: bytes) -> None:
    """Write a file of the records with a checksum at its end."""
    work.storage.write(work.path(name), content + hashlib.blake2b(content, digest_size=HASH_BYTES).digest())


def _read(work: WorkFolder, name: str) -> bytes:
    """Read a file that `_write` wrote.

    Raises:
        UserError: if it is damaged; it is then removed.
    """
    stored = work.storage.read(work.path(name))
    content, checksum = stored[:-HASH_BYTES], stored[-HASH_BYTES:]
    if hashlib.blake2b(content, digest_size=HASH_BYTES).digest() != checksum:
        work.storage.remove(work.path(_DONE))
        work.storage.remove(work.path(name))
        raise UserError(
            f"The file {work.storage.url(work.path(name))} was damaged and is removed; repeat the command, with "
            "partitions first the ones with --hash-only."
        )
    return content


def without_hashes(work: WorkFolder, all_units: Sequence[Unit]) -> list[Unit]:
    """Return the units whose hashes are not written yet."""
    names = work.names()
    return [unit for unit in all_units if _hashes_name(unit.number) not in names]


def check_known(work: WorkFolder) -> None:
    """Check that the hashes of all units have been compared.

    Raises:
        UserError: if they have not.
    """
    require(
        _DONE in work.names(),
        "The duplicates are not known yet; run all partitions with --hash-only, then the command once with --hash-only "
        "and without --partition, which compares the hashes.",
    )


def find_duplicates(work: WorkFolder, all_units: Sequence[Unit]) -> None:
    """Compare the hashes of all units, and write for each unit which of its rows are duplicates.

    Raises:
        UserError: if the hashes of a unit are damaged.
    """
    if _DONE in work.names():
        return
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
        _write(work, _duplicates_name(unit.number), numbers.tobytes())
    work.storage.write_json(work.path(_DONE), {"rows": rows})


def _of_round(work: WorkFolder, unit: int, number: int, rounds: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes of a unit's rows that belong to a round, `[n, 2]`, and the rows' numbers, `[n]`."""
    values = np.frombuffer(_read(work, _hashes_name(unit)), "<u8").reshape(-1, 2)
    rows = np.flatnonzero((values[:, 0] % rounds == number) & values.any(-1))
    return values[rows], rows


def _repeated(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each of the hashes `[n, 2]` whether an earlier one is equal to it."""
    order = np.lexsort((values[:, 1], values[:, 0]))  # stable: equal hashes stay in the order of the corpus
    ordered = values[order]
    repeated = np.zeros(len(values), dtype=np.bool_)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(-1)
    return repeated


def read_duplicates(work: WorkFolder, unit: int) -> NDArray[np.uint64]:
    """Return the numbers of a unit's rows, from 0 on and ascending, that are duplicates of earlier rows.

    Raises:
        UserError: if the file is damaged.
    """
    return np.frombuffer(_read(work, _duplicates_name(unit)), "<u8")
