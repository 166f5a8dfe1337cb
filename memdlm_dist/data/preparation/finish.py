"""Completion of a preparation: check that all units are there, merge their indices, write cards and counts."""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np

from memdlm_dist.compat import streaming
from memdlm_dist.data import output, row_lengths
from memdlm_dist.data.output import CARD, INDEX, LENGTHS, SPLITS
from memdlm_dist.data.preparation.record import Record
from memdlm_dist.data.preparation.summary import Summary
from memdlm_dist.data.preparation.work_folder import WorkFolder
from memdlm_dist.data.shards import Card
from memdlm_dist.errors import UserError

_SHOWN = 5  # missing units that a message names
_REQUESTS = 16  # records that are read at the same time


def check_complete(work: WorkFolder, n_units: int) -> list[Record]:
    """Return the records of all units, in the order of the corpus, after checking the size of every shard.

    Raises:
        UserError: if a unit is not finished, or a shard is missing.
    """
    names = work.names()
    with ThreadPoolExecutor(_REQUESTS if work.storage.remote else 1) as pool:
        by_unit = list(pool.map(lambda unit: work.records(unit, names), range(n_units)))
    if missing := [unit for unit, found in enumerate(by_unit) if not (found and found[-1].last)]:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise UserError(
            f"{len(missing)} of {n_units} units in {work.location} are not prepared ({shown}); run the partitions that "
            "prepare them (the unit's number modulo N), then merge again."
        )
    records = list(chain.from_iterable(by_unit))
    for split in SPLITS:
        sizes = work.storage.find(work.staged(split))
        for record in records:
            for shard in record.shards.get(split, []):
                name, size = f"{record.name}/{shard['raw_data']['basename']}", shard["raw_data"]["bytes"]
                if sizes.get(name) != size:
                    raise UserError(
                        f"The shard {work.storage.url(work.staged(split))}/{name} is missing or has another size than "
                        f"{size:,} bytes; repeat the command that prepared it (unit {record.unit}), which writes it "
                        "anew."
                    )
    return records


def finish(work: WorkFolder, records: Sequence[Record], counts: Summary, card: Card, names: tuple[str, ...]) -> None:
    """Write the files that make the shards of all units a data set.

    Args:
        records: of all units, in the order of the corpus.
        counts: of all units.
        card: without counts.
        names: folders of the output that are written.

    Raises:
        UserError: if the output would replace a file of the user.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for split in reversed(SPLITS):  # a run needs the training shards, so their card comes last
            folder = Path(scratch, split)
            folder.mkdir()
            _write_split(folder, split, records, card)
            for name in (LENGTHS, INDEX, CARD):
                if (folder / name).exists():
                    work.storage.take(folder / name, f"{work.staged(split)}/{name}")
    _remove_stale(work, records)
    work.mark_finished(counts)
    if not work.storage.remote:
        output.replace(Path(work.location), names)
    work.complete()


def _remove_stale(work: WorkFolder, records: Sequence[Record]) -> None:
    """Remove shards that no record names, which a preparation that was discarded may have left."""
    for split in SPLITS:
        parts = {record.name for record in records if split in record.shards}
        for name, size in work.storage.sizes(work.staged(split)).items():
            if size is None and output.is_part(name) and name not in parts:
                work.storage.remove(f"{work.staged(split)}/{name}")


def _write_split(folder: Path, split: str, records: Sequence[Record], card: Card) -> None:
    """Write index, card and lengths of a split to a folder."""
    with_rows = [record for record in records if split in record.shards]
    indices = []
    for record in with_rows:
        path = folder / record.name / INDEX
        path.parent.mkdir()
        path.write_text(json.dumps({"version": 2, "shards": record.shards[split]}))
        indices.append(str(path))
    if indices:
        streaming.merge_indices(indices, str(folder / "merged"))
        (folder / "merged" / INDEX).replace(folder / INDEX)
    else:
        (folder / INDEX).write_text(json.dumps({"version": 2, "shards": []}))
    rows = [record.summary.sequences[split] for record in with_rows]
    # With `pad_multiple` every record has the lengths of its rows.
    lengths = [record.lengths[split] for record in with_rows] if card.pad_multiple else []
    varies = any((values[1::2] != card.seq_len).any() for values in lengths)
    if varies:
        row_lengths.write(folder, np.concatenate(lengths))
    complete = replace(
        card,
        sequences=sum(rows),
        most_documents=max((record.most_documents[split] for record in with_rows), default=0),
        pad_multiple=card.pad_multiple if varies else 0,
    )
    (folder / CARD).write_text(json.dumps(asdict(complete), indent=2) + "\n")
