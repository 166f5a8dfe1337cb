"""Sets of fast weights: which samples of a micro-batch share one.

Shapes: B rows, S document slots per row, U = B S samples, n samples per set, G sets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm_dist.errors import require


@dataclass(frozen=True)
class Sets:
    """Assignment of a micro-batch's samples to sets of fast weights; consecutive samples share a set.

    If each row is one sample, n rows share a set. Otherwise n documents of one row do; the last set of a row may have
    fewer.
    """

    rows: int  # B
    slots: int  # S; 1 if each row is one sample
    samples_per_set: int | None  # n; None: all samples of the micro-batch share one set

    def __post_init__(self) -> None:
        require(
            self.rows % self.rows_per_set == 0,
            f"A micro-batch of {self.rows} rows does not hold whole groups of {self.rows_per_set} rows that share fast "
            "weights; make training.local_batch_size a multiple of parametric_memory.samples_per_set.",
        )

    @property
    def count(self) -> int:
        """Number of sets, G."""
        return 1 if self.samples_per_set is None else self.rows // self.rows_per_set * self.per_row

    @property
    def rows_per_set(self) -> int:
        """Number of rows that share a set."""
        if self.samples_per_set is None:
            return self.rows
        return self.samples_per_set if self.slots == 1 else 1

    @property
    def per_row(self) -> int:
        """Number of sets in a row."""
        return 1 if self.samples_per_set is None or self.slots == 1 else -(-self.slots // self.samples_per_set)

    def of_samples(self, device: torch.device) -> Tensor:
        """Return the number of every sample's set, int64 `[U]`."""
        slot_S = torch.arange(self.slots, device=device)
        slot_S = torch.zeros_like(slot_S) if self.samples_per_set is None else slot_S // self.samples_per_set
        row_B1 = torch.arange(self.rows, device=device).unsqueeze(1)
        return (row_B1 // self.rows_per_set * self.per_row + slot_S).flatten()

    def of_rows(self, row_C: Tensor) -> Tensor:
        """Return the numbers of all sets of some rows, int64; rows that share a set must be consecutive in `row_C`."""
        first_C1 = (row_C[:: self.rows_per_set] // self.rows_per_set * self.per_row).unsqueeze(1)
        return (first_C1 + torch.arange(self.per_row, device=row_C.device)).flatten()

    def first_samples(self, device: torch.device) -> Tensor:
        """Return the number of every set's first sample, int64 `[G]`."""
        row_G1 = torch.arange(0, self.rows, self.rows_per_set, device=device).unsqueeze(1)
        slot = torch.arange(self.per_row, device=device) * (self.samples_per_set or self.slots)
        return (row_G1 * self.slots + slot).flatten()
