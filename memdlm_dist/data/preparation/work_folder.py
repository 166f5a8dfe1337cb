"""Unfinished preparation at its output: the plan, one record for each finished part of a unit, and staged shards.

A part counts as finished once its record is written, which happens after all of its shards are in place. So a
preparation can be killed at any time, and the same command goes on.
"""

import contextlib
import errno
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from memdlm_dist.compat import streaming
from memdlm_dist.data import output
from memdlm_dist.data.output import SPLITS, SUMMARY, TOKENIZER
from memdlm_dist.data.preparation import summary
from memdlm_dist.data.preparation.plan import FORMAT, Plan
from memdlm_dist.data.preparation.record import Record, part_name
from memdlm_dist.data.preparation.summary import Summary
from memdlm_dist.data.shards import HASH, Card
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage, StoreError, is_remote
from memdlm_dist.runtime.writer import LEASE, LOCK

FOLDER = "memdlm_units"
PLAN = "plan.json"
_SETUP = "setup.json"
_FINISHED = "finished.json"
# Names of the files of the records, and of folders in which commands work, such as the locks of partitions.
_RECORDS = r"((plan|setup|finished|duplicates)\.json|\d+-\d+\.json|\d+\.(hashes|duplicates))(\.\d+\.tmp)?"
_FINGERPRINT, _SCRATCH, _PARTITION = r"[0-9a-f]{12}", r"scratch(-\d+-of-\d+)?", r"partition-\d+-of-\d+"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class WorkFolder:
    """Unfinished preparation at an output.

    On disk, shards are staged in folders such as train.partial, which replace the folders of an earlier preparation at
    the end. A store has no renaming: there the shards are uploaded to their final place, and cards and indices last.

    Args:
        location: folder or URL of the output.
        fingerprint: of the plan.
    """

    def __init__(self, location: str, fingerprint: str):
        self.location, self.fingerprint = location, fingerprint
        self.storage = Storage(location)
        self._folder = f"{FOLDER}/{fingerprint}"

    def staged(self, name: str) -> str:
        """Return the name of the folder in which `name` is written."""
        return name if self.storage.remote else output.staged_name(name)

    def path(self, name: str) -> str:
        """Return the name of a file of the records, relative to the output."""
        return f"{self._folder}/{name}"

    def names(self) -> set[str]:
        """Return the names of all files of the records."""
        return set(self.storage.sizes(self._folder))

    def claim(self, plan: Plan) -> None:
        """Write the plan, which comes before all other files: what follows belongs to this preparation."""
        self.storage.write_json(self.path(PLAN), asdict(plan))

    def begin(self, card: Card, names: tuple[str, ...]) -> None:
        """Record that tokenizer and folders are made, so that units can be prepared.

        Args:
            card: of the shards, without counts.
            names: folders that the preparation writes.
        """
        self.storage.write_json(self.path(_SETUP), {"card": asdict(card), "names": names})

    def setup(self) -> tuple[Card, tuple[str, ...]]:
        """Return the card and the folder names that `begin` wrote."""
        values = self.storage.read_json(self.path(_SETUP))
        return Card(**values["card"]), tuple(values["names"])

    @property
    def has_begun(self) -> bool:
        """True if units can be prepared: plan and card can be read, and the tokenizer is there."""
        if PLAN not in self.names():
            return False
        try:
            _, names = self.setup()
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return False
        return TOKENIZER not in names or self.storage.exists(f"{self.staged(TOKENIZER)}/tokenizer.json")

    @property
    def is_empty(self) -> bool:
        """True if no unit has been worked on."""
        return not self.count_finished()

    def count_finished(self) -> int:
        """Return the number of finished parts, and of units whose rows are hashed."""
        return sum(bool(re.fullmatch(r"\d+-\d+\.json|\d+\.hashes", name)) for name in self.names())

    def check_not_discarded(self) -> None:
        """Check that no other command has finished or discarded the preparation since this one began.

        Raises:
            UserError: if one has; the output then belongs to the other command.
        """
        require(
            self.storage.exists(self.path(PLAN)),
            f"Another command has finished or discarded the preparation in {self.location}; this one stops. End all "
            "partitions before you merge them or begin anew.",
        )

    def write(self, record: Record) -> None:
        """Record that a part is finished."""
        self.storage.write_json(self.path(f"{record.name}.json"), record.to_json())

    def records(self, unit: int, names: set[str] | None = None) -> list[Record]:
        """Read the records of a unit's finished parts, up to the first one that is missing or damaged.

        Args:
            names: result of `names`, to save requests.
        """
        found: list[Record] = []
        while not (found and found[-1].last):
            name = f"{part_name(unit, len(found))}.json"
            if names is not None and name not in names:
                break
            try:
                found.append(Record.from_json(self.storage.read_json(self.path(name))))
            except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, zlib.error):
                break
        return found

    def is_intact(self, record: Record) -> bool:
        """Return whether the shards of a part have the recorded sizes, and on disk also the recorded checksums."""
        for split, shards in record.shards.items():
            folder = f"{self.staged(split)}/{record.name}"
            sizes = self.storage.sizes(folder)
            for shard in shards:
                info = shard.get("raw_data", {})
                if not info.keys() >= {"basename", "bytes", "hashes"} or sizes.get(info["basename"]) != info["bytes"]:
                    return False
                if not self.storage.remote:
                    content = self.storage.read(f"{folder}/{info['basename']}")
                    if streaming.checksum(HASH, content) != info["hashes"][HASH]:
                        return False
        return True

    def mark_finished(self, counts: Summary) -> None:
        """Record that all files but summary.json are written; on disk, the folders must still be replaced."""
        self.storage.write_json(self.path(_FINISHED), summary.to_json(counts))

    @property
    def must_be_completed(self) -> bool:
        """True if a command was killed after all files were in place, on disk after it had replaced the folders."""
        if _FINISHED not in self.names():
            return False
        return self.storage.remote or not any(
            Path(self.location, self.staged(name)).exists() for name in (TOKENIZER, *SPLITS)
        )

    def complete(self) -> None:
        """Write summary.json and remove all records at the output, after everything else is in place."""
        self.storage.write_json(SUMMARY, self.storage.read_json(self.path(_FINISHED)))
        if self.storage.remote:
            self.storage.remove(self._folder, first=PLAN)
            self.storage.remove(FOLDER)
        else:
            _remove_records(Path(self.location, FOLDER))


def _remove_records(folder: Path) -> None:
    """Remove the records of all preparations from a folder on disk, and no other file."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or not path.is_dir():
            continue
        if re.fullmatch(_SCRATCH, path.name):
            shutil.rmtree(path, ignore_errors=True)
        pattern = _RECORDS if re.fullmatch(_FINGERPRINT, path.name) else None
        if re.fullmatch(_PARTITION, path.name):
            pattern = "|".join(map(re.escape, (LOCK, LEASE)))
        if pattern is None:
            continue
        # After an interrupted removal there is either a plan that can be read, or none.
        order = (_FINISHED, PLAN, _SETUP)
        for file in sorted(path.iterdir(), key=lambda file: order.index(file.name) if file.name in order else -1):
            if re.fullmatch(pattern, file.name) and file.is_file():
                file.unlink()
        _remove_if_empty(path)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_plan(location: str) -> tuple[WorkFolder, Plan]:
    """Read the plan of the unfinished preparation at an output.

    Raises:
        UserError: if there is none.
    """
    for work, plan in unfinished(location):
        if work.has_begun:
            require(
                plan.format == FORMAT,
                f"The plan {work.storage.url(work.path(PLAN))} is damaged, or of another version of memdlm_dist; "
                "repeat the command of one of its partitions, which writes it anew.",
            )
            return work, plan
    raise UserError(
        f"There is no unfinished preparation in {location}; prepare the data, or name the --output of its partitions."
    )


def unfinished(location: str) -> list[tuple[WorkFolder, Plan]]:
    """Return the preparations that were begun at an output and not finished."""
    storage, found = Storage(location), []
    for fingerprint, size in sorted(storage.sizes(FOLDER).items()):
        if size is None and re.fullmatch(r"[0-9a-f]{12}", fingerprint):  # leases of partitions are there too
            try:
                plan = Plan(**storage.read_json(f"{FOLDER}/{fingerprint}/{PLAN}"))
            except FileNotFoundError:
                continue
            except (ValueError, TypeError):  # damaged, or of another version
                plan = Plan({}, [], "", 0, [], format=0)
            found.append((WorkFolder(location, fingerprint), plan))
    return found


def has_partitions(location: str) -> bool:
    """Return whether partitions have claimed parts of an output, and may still be running."""
    return any(re.fullmatch(_PARTITION, name) for name in Storage(location).sizes(FOLDER))


def recover(location: str) -> None:
    """Finish a preparation that was killed after it had written all shards, indices and cards."""
    if not is_remote(location):
        output.recover(Path(location))
    for work, _ in unfinished(location):
        if work.must_be_completed:
            work.complete()


def check_output(location: str, names: tuple[str, ...], plan: Plan, overwrite: bool) -> None:
    """Check that a preparation can begin or go on at an output; with `overwrite`, discard another one's records.

    Args:
        names: folders that it will write.

    Raises:
        UserError: if finished work would be lost, or a file of the user.
    """
    begun = unfinished(location)
    others = [(work, other) for work, other in begun if work.fingerprint != plan.fingerprint]
    for work, other in others:
        done, running = work.count_finished(), has_partitions(location)
        require(
            overwrite or not (done or running),
            f"{location} holds {done} finished parts of another preparation"
            f"{', whose partitions may be running' * running} ({plan.difference(other)}); repeat its command to finish "
            "it, or end all of its commands and pass --overwrite to discard it.",
        )
    goes_on = any(work.fingerprint == plan.fingerprint for work, _ in begun)
    if is_remote(location):
        _check_store(location, names, goes_on or bool(others), overwrite)
    else:
        output.check(Path(location), names, overwrite)
    if others:
        discard(location)


def _check_store(location: str, names: tuple[str, ...], begun: bool, overwrite: bool) -> None:
    """Check that a store holds no finished shards; those of a preparation that was begun may be replaced."""
    storage = Storage(location)
    for name in (*names, SUMMARY):
        exists = bool(storage.sizes(name)) if name != SUMMARY else SUMMARY in storage.sizes()
        require(
            begun or not exists,
            f"{location}/{name} exists already; "
            + ("--overwrite replaces no data in a store: " if overwrite else "")
            + "choose another --output, or remove it with the store's tools.",
        )


def discard(location: str) -> None:
    """Remove the records and the staged files of all unfinished preparations at an output."""
    storage, begun = Storage(location), unfinished(location)
    for work, _ in begun:
        storage.remove(work.path(PLAN))  # first: a partition that is still running then stops
    if not storage.remote:
        output.discard(Path(location))
        _remove_records(Path(location, FOLDER))
        return
    if begun:
        # The check before a preparation found neither shards nor a tokenizer, so these are of unfinished ones. Shards
        # of a part that was interrupted have no record.
        for split in SPLITS:
            for name in (output.CARD, output.INDEX, output.LENGTHS):
                storage.remove(f"{split}/{name}")
            for name in storage.sizes(split):
                if output.is_part(name):
                    storage.remove(f"{split}/{name}")
        for name in storage.sizes(TOKENIZER):
            if output.is_tokenizer_file(name):
                storage.remove(f"{TOKENIZER}/{name}")
    storage.remove(FOLDER)


def unwritable(location: object, error: Exception) -> UserError:
    """Return the error for an output that cannot be written to."""
    remedy = "free space there" if isinstance(error, OSError) and error.errno in _FULL else "check the folder or store"
    return UserError(
        f"The output {location} cannot be written to ({one_line(error)}); {remedy}. Finished units are kept: the same "
        "command goes on from there."
    )


@contextlib.contextmanager
def outages_explained(location: object) -> Iterator[None]:
    """Turn the error of an output's store that does not answer into a sentence."""
    try:
        yield
    except StoreError as error:
        raise unwritable(location, error) from None
