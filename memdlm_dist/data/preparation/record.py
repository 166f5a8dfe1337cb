"""Record of a finished part of a unit."""

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memdlm_dist.data.preparation import summary
from memdlm_dist.data.preparation.summary import Summary


@dataclass(frozen=True)
class Record:
    """Finished part of a unit.

    Attributes:
        unit: number of the unit.
        part: number of the part in the unit.
        last: the unit ends with this part.
        summary: counts of the part.
        shards: split -> entries of its index.json, if the part has rows in the split.
        most_documents: split -> largest number of documents in a row.
        lengths: split -> content and padded length of each row, of fine-tuning rows.
    """

    unit: int
    part: int
    last: bool
    summary: Summary
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    most_documents: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the part, which is the name of its folders of shards; names sort in the order of the corpus."""
        return part_name(self.unit, self.part)

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        packed = {
            split: base64.b64encode(zlib.compress(lengths.astype("<u4").tobytes())).decode()
            for split, lengths in self.lengths.items()
        }
        return {**vars(self), "summary": summary.to_json(self.summary), "lengths": packed}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return the record that `to_json` made."""
        lengths = {
            split: np.frombuffer(zlib.decompress(base64.b64decode(packed)), "<u4")
            for split, packed in values["lengths"].items()
        }
        return cls(**{**values, "summary": summary.from_json(values["summary"]), "lengths": lengths})


def part_name(unit: int, part: int) -> str:
    """Return the name of a part of a unit."""
    return f"{unit:06d}-{part:04d}"
