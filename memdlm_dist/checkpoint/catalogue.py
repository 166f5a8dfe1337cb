"""Catalogue of the checkpoints in a folder: inspection, verification and removal.

PyTorch's distributed checkpoint (DCP) writes `.metadata` last, by a rename; without that file, saving was interrupted.
The metadata lists the byte range of every entry in every file, so file sizes alone reveal missing and truncated files.
Each entry is a zip archive with checksums, so `verify` finds flipped bits without unpickling anything.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from memdlm_dist.checkpoint.reading import checksums_match, read_metadata
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage

METADATA = ".metadata"
RUN = "run.json"
SCORES = "scores.json"  # step -> validation loss; stored next to the checkpoints for resumed runs
EXPORT = "hf"  # folder in a checkpoint with its Hugging Face export
PARTIAL_EXPORT = f"{EXPORT}.partial"  # name of that folder until the export is complete
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class SavedCheckpoint:
    """State of one checkpoint.

    Attributes:
        complete: saving was not interrupted.
        exported: the folder holds only weights, in safetensors; runs do not resume from it, and it is never pruned.
        problem: predicate such as "lacks the file x"; empty if there is no problem.
        size: in bytes, with the export in the folder `hf`.
    """

    step: int
    complete: bool
    exported: bool
    problem: str
    size: int

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return folder_name(self.step)

    @property
    def intact(self) -> bool:
        """True if the checkpoint is complete and no problem was found."""
        return self.complete and not self.problem


def folder_name(step: int) -> str:
    """Return the folder name `step-N` of a step."""
    return f"step-{step}"


class Catalogue:
    """Checkpoints `step-N` in the folder at a path or URL."""

    def __init__(self, location: str):
        self.storage = Storage(location)

    def steps(self) -> list[int]:
        """Return the steps of all folders named `step-N`, complete or not, in ascending order."""
        names = (_NAME.fullmatch(name) for name, size in self.storage.sizes().items() if size is None)
        return sorted(int(match[1]) for match in names if match)

    def all(self) -> list[SavedCheckpoint]:
        """Inspect every checkpoint, including file sizes, in ascending order."""
        return [self.inspect(step) for step in self.steps()]

    def inspect(self, step: int) -> SavedCheckpoint:
        """Inspect one checkpoint, including file sizes, without reading its data."""
        sizes = self.storage.sizes(folder_name(step))
        exported = is_export(sizes)
        problem = "" if exported else self._problem(step, sizes)
        complete = METADATA in sizes and not exported
        exports = [
            self.storage.sizes(f"{folder_name(step)}/{name}") for name in (EXPORT, PARTIAL_EXPORT) if name in sizes
        ]
        size = sum(size or 0 for files in (sizes, *exports) for size in files.values())
        return SavedCheckpoint(step, complete, exported, problem, size)

    def complete_steps(self) -> list[int]:
        """Return the steps of complete checkpoints in ascending order, without checking file sizes."""
        sizes = {step: self.storage.sizes(folder_name(step)) for step in self.steps()}
        return [step for step, files in sizes.items() if METADATA in files and not is_export(files)]

    def _problem(self, step: int, sizes: dict[str, int | None]) -> str:
        if not sizes:
            return "does not exist"
        if METADATA not in sizes:
            return "is incomplete: saving it was interrupted"
        try:
            ends = {name: max(o + n for o, n, _ in entries) for name, entries in self._entries(step).items()}
        except Exception as error:  # a broken pickle can raise anything
            return f"has a {METADATA} that cannot be read ({one_line(error)})"
        for name, end in sorted(ends.items()):
            size = sizes.get(name)
            if size is None:
                return f"lacks the file {name}"
            if size < end:
                return f"has a truncated file {name}: {size:,} of {end:,} bytes"
        return ""

    def _entries(self, step: int) -> dict[str, list[tuple[int, int, str]]]:
        """Return file -> (offset, length, name) of each entry in the file."""
        entries: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for index, info in read_metadata(self.storage.url(folder_name(step))).storage_data.items():
            entries[info.relative_path].append((info.offset, info.length, index.fqn))
        return entries

    def verify(self, step: int) -> Iterator[str]:
        """Read all files of a checkpoint; yield each file's problem, or an empty string if the file is intact.

        If `inspect` finds a problem, yield only that; for an export, yield one empty string.
        """
        saved = self.inspect(step)
        if saved.problem or saved.exported:
            yield saved.problem
            return
        for name, entries in sorted(self._entries(step).items()):
            problem = ""
            with self.storage.open(f"{saved.name}/{name}") as file:
                for offset, length, tensor in sorted(entries):
                    file.seek(offset)
                    if not checksums_match(file.read(length)):
                        problem = f"has a corrupt file {name}: the checksum of {tensor} is wrong"
                        break
            yield problem

    def scores(self) -> dict[int, float]:
        """Return the validation losses that `add_score` recorded, by step.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            return {int(step): float(loss) for step, loss in dict(self.storage.read_json(SCORES)).items()}
        except FileNotFoundError:
            return {}

    def best(self, steps: Collection[int]) -> int | None:
        """Return the step in `steps` with the lowest recorded loss, the latest of equal ones; None without records."""
        scores = self.scores()
        return min((s for s in steps if s in scores), key=lambda step: (scores[step], -step), default=None)

    def add_score(self, step: int, loss: float) -> None:
        """Record the validation loss of a step."""
        self.storage.write_json(SCORES, {**self.scores(), step: loss})

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its metadata first, so that an interrupted removal leaves an incomplete checkpoint.

        Raises:
            UserError: if no other intact checkpoint would be left.
        """
        others = [other for other in self.steps()[::-1] if other != step]
        if self.inspect(step).intact and not any(self.inspect(other).intact for other in others):
            raise UserError(
                f"{self.storage.url(folder_name(step))} is the only intact checkpoint and is not removed; save "
                "another one first."
            )
        self.storage.remove(folder_name(step), first=METADATA)


def read_run(checkpoint: Storage) -> dict[str, Any]:
    """Read a checkpoint's run.json; return an empty dictionary if the file does not exist.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        run = checkpoint.read_json(RUN)
        require(isinstance(run, dict), f"it is a {type(run).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{checkpoint.url(RUN)} is damaged ({one_line(error)}); restore the file, or remove it to skip the "
            "comparison with the saved run."
        ) from None
    return dict(run)


def is_export(files: Collection[str]) -> bool:
    """Return whether a folder with these files is an export in safetensors.

    Other files in an export, such as `.metadata`, are never unpickled.
    """
    return any(name.endswith(".safetensors") for name in files)


def prunable_steps(intact: Collection[int], keep_latest: int, keep_every: int, best: int | None = None) -> list[int]:
    """Return the steps of intact checkpoints that retention allows to remove, never all of them.

    Args:
        intact: steps of the intact checkpoints.
        keep_latest: number of latest checkpoints to keep; 0 keeps all.
        keep_every: also keep steps that are a multiple of this; 0 keeps none of them.
        best: another step to keep.

    Raises:
        UserError: if `keep_latest` is negative.
    """
    require(keep_latest >= 0, f"The number of latest checkpoints to keep must not be negative, but is {keep_latest}.")
    if keep_latest == 0:
        return []
    keep = {*sorted(intact)[-keep_latest:], best}
    return sorted(step for step in intact if step not in keep and not (keep_every and step % keep_every == 0))
