"""The checkpoints of a folder: which are whole, and which may go.

Torch's distributed checkpoint (DCP) writes its `.metadata` last, and by a rename: a checkpoint without it was
interrupted. The metadata says which bytes of which file hold what, so that files that are missing or cut short are
found from their sizes alone. Every entry of a file is a zip archive with a checksum, so that a thorough look finds
each flipped bit without unpickling anything.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from memdlm_dist.checkpoint.reading import is_sound, read_metadata
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.storage import Storage

METADATA = ".metadata"
RUN = "run.json"
SCORES = "scores.json"  # step -> validation loss, beside the checkpoints: wherever a run goes on, it finds them
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint, and what is wrong with it.

    Attributes:
        complete: saving it came to its end.
        exported: it holds weights in safetensors alone, for others to read; it is never loaded or removed here.
        problem: what is wrong, as the end of a sentence; empty if nothing is.
        size: bytes.
    """

    step: int
    complete: bool
    exported: bool
    problem: str
    size: int

    @property
    def name(self) -> str:
        return folder_name(self.step)

    @property
    def intact(self) -> bool:
        return self.complete and not self.problem


def folder_name(step: int) -> str:
    return f"step-{step}"


class Catalogue:
    """The checkpoints `step-N` under a path or URL."""

    def __init__(self, location: str):
        self.storage = Storage(location)

    def steps(self) -> list[int]:
        """Return the steps of all that is named like a checkpoint, complete or not, in ascending order."""
        names = (_NAME.fullmatch(name) for name, size in self.storage.sizes().items() if size is None)
        return sorted(int(match[1]) for match in names if match)

    def all(self) -> list[SavedCheckpoint]:
        """Every checkpoint, its files' sizes checked."""
        return [self.inspect(step) for step in self.steps()]

    def inspect(self, step: int) -> SavedCheckpoint:
        """One checkpoint, its files' sizes checked."""
        sizes = self.storage.sizes(folder_name(step))
        exported = is_export(sizes)
        problem = "" if exported else self._problem(step, sizes)
        complete = METADATA in sizes and not exported
        return SavedCheckpoint(step, complete, exported, problem, sum(size or 0 for size in sizes.values()))

    def complete_steps(self) -> list[int]:
        """Return the steps of complete checkpoints in ascending order; sizes are not checked."""
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
        """File -> (offset, length, name) of each entry in it."""
        entries: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for index, info in read_metadata(self.storage.url(folder_name(step))).storage_data.items():
            entries[info.relative_path].append((info.offset, info.length, index.fqn))
        return entries

    def verify(self, step: int) -> Iterator[str]:
        """Read a whole checkpoint; yields what is wrong, and an empty text for each file that was read through."""
        saved = self.inspect(step)
        if saved.problem or saved.exported:
            yield saved.problem
            return
        for name, entries in sorted(self._entries(step).items()):
            wrong = ""
            with self.storage.open(f"{saved.name}/{name}") as file:
                for offset, length, tensor in sorted(entries):
                    file.seek(offset)
                    if not is_sound(file.read(length)):
                        wrong = f"has a corrupt file {name}: the checksum of {tensor} is wrong"
                        break
            yield wrong

    def scores(self) -> dict[int, float]:
        """Return the validation losses that were noted by `add_score`, by step.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            return {int(step): float(loss) for step, loss in dict(self.storage.read_json(SCORES)).items()}
        except FileNotFoundError:
            return {}

    def best(self, steps: Collection[int]) -> int | None:
        """Return the step among `steps` with the least loss noted, the last of several; None if none was noted."""
        scores = self.scores()
        return min((s for s in steps if s in scores), key=lambda step: (scores[step], -step), default=None)

    def add_score(self, step: int, loss: float) -> None:
        """Note the validation loss of a step."""
        self.storage.write_json(SCORES, {**self.scores(), step: loss})

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its metadata first: interrupted, it is seen to be incomplete.

        Raises:
            UserError: if no other good checkpoint would be left, whatever asked for it.
        """
        others = [other for other in self.steps()[::-1] if other != step]
        if self.inspect(step).intact and not any(self.inspect(other).intact for other in others):
            raise UserError(f"{self.storage.url(folder_name(step))} is the only good checkpoint, and is not removed.")
        self.storage.remove(folder_name(step), first=METADATA)


def read_run(checkpoint: Storage) -> dict[str, Any]:
    """Read a checkpoint's run.json; empty if there is none.

    Raises:
        UserError: if it is damaged.
    """
    try:
        found = checkpoint.read_json(RUN)
        require(isinstance(found, dict), f"it is a {type(found).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{checkpoint.url(RUN)} is damaged ({one_line(error)}); restore the file, or remove it to go on without "
            "the check of what changed."
        ) from None
    return dict(found)


def is_export(files: Collection[str]) -> bool:
    """Return whether a folder of these files holds weights to exchange: beside safetensors nothing is unpickled."""
    return any(name.endswith(".safetensors") for name in files)


def prunable_steps(good: Collection[int], keep_latest: int, keep_every: int, best: int | None = None) -> list[int]:
    """The steps among those of good checkpoints that may go; never all of them.

    Args:
        good: steps.
        keep_latest: how many of the last ones stay; 0 for all of them.
        keep_every: those whose step is a multiple of it stay too; 0 for none.
        best: a step that stays too.

    Raises:
        UserError: if `keep_latest` is negative.
    """
    require(keep_latest >= 0, f"The number of latest checkpoints to keep must not be negative, but is {keep_latest}.")
    if keep_latest == 0:
        return []
    keep = {*sorted(good)[-keep_latest:], best}
    return sorted(step for step in good if step not in keep and not (keep_every and step % keep_every == 0))
