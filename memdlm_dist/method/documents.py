"""The documents of packed rows. Each is a sample: it attends to itself alone, its positions start from 0, and its
noise level, mask ratios and fast weights are its own.

Every row has the same number of slots for documents, some of them empty, so that a micro-batch has B S samples in
a fixed order: slot s of row b is number b S + s.

Shapes: B rows, L tokens of a row, T = B L tokens, S slots of a row, U = B S samples, P places.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.errors import require

# The number that a row's fill has in place of a document's.
PADDING = -1

# Between the ids of two documents of one row; the first has the row's own. Rows are fewer than this.
_ID_STRIDE = 2**40

# Grouped products take groups of a multiple of so many rows, for the gradients of their matrices. Groups without rows
# are none of them: some accelerators leave the gradients of their matrices undefined (pytorch/pytorch#172439).
GROUP_ROWS = 8


class GroupedTokens(NamedTuple):
    """Tokens laid out for grouped products, sample after sample.

    Each sample, one without a token too, has a positive multiple of 8 places, of which those behind its tokens are
    empty. The number of places is a function of the shapes alone.
    """

    row_T: Tensor  # int64: of every token
    offsets_U: Tensor  # int32: where each sample's places end; the last sample's are all that are left
    n_rows: int  # P

    def scatter(self, x_BLi: Tensor) -> Tensor:
        """Return the tokens at their places `[P, i]`, and zeros at the empty ones."""
        x_Ti = x_BLi.flatten(0, 1)
        return x_Ti.new_zeros(self.n_rows, x_Ti.shape[1]).index_copy(0, self.row_T, x_Ti)

    def gather(self, y_Po: Tensor, rows: int) -> Tensor:
        """Return the tokens `[B, L, o]` from their places."""
        return y_Po.index_select(0, self.row_T).unflatten(0, (rows, -1))


class SetAssignment(NamedTuple):
    """Which of its row's sets of fast weights, one for each document, is a token's."""

    slot_BL: Tensor  # int64
    slots: int  # S
    # The tokens, and those of this tensor-parallel rank's sequence shard; None where there are no grouped products.
    grouped: GroupedTokens | None = None
    grouped_shard: GroupedTokens | None = None

    def mask(self) -> Tensor:
        """Return whether a set is the token's, bool `[B, L, S]`."""
        return self.slot_BL.unsqueeze(-1) == torch.arange(self.slots, device=self.slot_BL.device)


class Documents(NamedTuple):
    """The document that each token of a packed row belongs to."""

    number_BL: Tensor  # int64: 0, 1, ... along the row, `PADDING` behind the last
    position_BL: Tensor  # int64: position within the document
    slots: int  # S, the number of documents that a row can hold

    @classmethod
    def from_numbers(cls, number_BL: Tensor, slots: int | None = None) -> "Documents":
        """Build from the tokens' document numbers.

        Args:
            slots: S; None for the smallest power of two that these rows fit in.

        Raises:
            UserError: if a row holds more documents than `slots`.
        """
        most = int(number_BL.max().clamp(min=0)) + 1
        require(
            slots is None or most <= slots,
            f"A row of the shards holds {most} documents, more than their card says (most_documents); prepare the data "
            "anew.",
        )
        column_L = torch.arange(number_BL.shape[1])
        begins_BL = torch.ones_like(number_BL, dtype=torch.bool)
        begins_BL[:, 1:] = number_BL[:, 1:] != number_BL[:, :-1]
        start_BL = torch.where(begins_BL, column_L, 0).cummax(1).values
        return cls(number_BL, column_L - start_BL, slots or power_of_two(most))

    @property
    def slot_BL(self) -> Tensor:
        """Each token's slot; the fill is with the last one, where it changes nothing: it is never masked."""
        return torch.where(self.number_BL == PADDING, self.slots - 1, self.number_BL)

    @property
    def sample_BL(self) -> Tensor:
        """Each token's sample."""
        first_B1 = self.slots * torch.arange(len(self.number_BL), device=self.number_BL.device).unsqueeze(1)
        return first_B1 + self.slot_BL

    def ids(self, row_ids_B: Tensor) -> Tensor:
        """Return the global ids of the samples, `[U]`."""
        return (row_ids_B.unsqueeze(1) + _ID_STRIDE * torch.arange(self.slots)).flatten()

    def count_per_sample(self, chosen_BL: Tensor) -> Tensor:
        """Count the chosen tokens of every sample, int64 `[U]`."""
        zeros_U = torch.zeros(len(self.number_BL) * self.slots, dtype=torch.int64)
        return zeros_U.index_add(0, self.sample_BL.flatten(), chosen_BL.flatten().long())

    def broadcast(self, value_U: Tensor) -> Tensor:
        """Broadcast a per-sample value to the sample's tokens, `[B, L]`."""
        return value_U[self.sample_BL]

    def rank_within_sample(self, u_BL: Tensor) -> Tensor:
        """Count the tokens of the same sample with a smaller u, int64 `[B, L]`."""
        sample_T = self.sample_BL.flatten()
        order_T = u_BL.flatten().argsort()
        order_T = order_T[sample_T[order_T].argsort(stable=True)]  # sample after sample, in each by u
        size_U = self.count_per_sample(torch.ones_like(self.number_BL))
        first_U = size_U.cumsum(0) - size_U
        rank_T = torch.empty_like(order_T)
        rank_T[order_T] = torch.arange(len(order_T)) - first_U[sample_T[order_T]]
        return rank_T.view_as(u_BL)

    def cu_seqlens(self) -> Tensor:
        """Return where the sequences of all rows end, laid end to end, behind a 0: int32 `[B (S + 1) + 1]`.

        A row's are its slots, empty ones too, and its padding. Nothing waits for the device.
        """
        number_BL = torch.where(self.number_BL == PADDING, self.slots, self.number_BL)
        first_B1 = (self.slots + 1) * torch.arange(len(number_BL), device=number_BL.device).unsqueeze(1)
        sequence_T = (first_B1 + number_BL).flatten()
        end_n = torch.zeros(len(number_BL) * (self.slots + 1) + 1, dtype=torch.int64, device=number_BL.device)
        return end_n.index_add(0, sequence_T + 1, torch.ones_like(sequence_T)).cumsum(0).int()

    def mean_attended(self) -> float:
        """Return how many tokens a token attends to, on average; padding attends to itself.

        Waits for the device that holds the documents.
        """
        at_end_BL = torch.ones_like(self.number_BL, dtype=torch.bool)
        at_end_BL[:, :-1] = self.number_BL[:, :-1] != self.number_BL[:, 1:]
        sizes = (self.position_BL[at_end_BL] + 1).double()
        return float(sizes.square().sum()) / self.number_BL.numel()

    def slice(self, first: int, length: int) -> "Documents":
        """Return the part of some columns, as they lie in the whole rows."""
        columns = slice(first, first + length)
        return self._replace(number_BL=self.number_BL[:, columns], position_BL=self.position_BL[:, columns])

    def assign_sets(self, grouped: bool = False, tp_rank: int = 0, tp_size: int = 1) -> SetAssignment:
        """Describe which set of fast weights is each token's; nothing waits for the device.

        Args:
            grouped: for grouped products.
            shard, shards: this tensor-parallel rank's part of the columns.
        """
        if not grouped:
            return SetAssignment(self.slot_BL, self.slots)
        whole, width = self.grouped(), self.number_BL.shape[1] // tp_size
        part = whole if tp_size == 1 else self.slice(tp_rank * width, width).grouped()
        return SetAssignment(self.slot_BL, self.slots, whole, part)

    def grouped(self) -> GroupedTokens:
        """Lay the tokens out; those of a sample follow each other already."""
        sample_T = self.sample_BL.flatten()
        tokens, samples = len(sample_T), len(self.number_BL) * self.slots
        size_U = torch.zeros(samples, dtype=torch.int64, device=sample_T.device)
        size_U = size_U.index_add(0, sample_T, torch.ones_like(sample_T))
        places_U = (size_U + GROUP_ROWS - 1).clamp(min=GROUP_ROWS) // GROUP_ROWS * GROUP_ROWS
        offsets_U = places_U.cumsum(0)
        shift_U = (offsets_U - places_U) - (size_U.cumsum(0) - size_U)
        row_T = torch.arange(tokens, device=sample_T.device) + shift_U[sample_T]
        places = -(-tokens // GROUP_ROWS) * GROUP_ROWS + GROUP_ROWS * samples
        offsets_U[-1:] = places
        return GroupedTokens(row_T, offsets_U.int(), places)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def count_per_sample(chosen_BL: Tensor, documents: Documents | None) -> Tensor:
    """Number of chosen tokens of every sample, int64 `[U]`: of every row, if these are not packed."""
    return chosen_BL.sum(1) if documents is None else documents.count_per_sample(chosen_BL)


def broadcast_to_tokens(value_U: Tensor, documents: Documents | None) -> Tensor:
    """Broadcast a per-sample value to the sample's tokens: `[B, 1]`, or `[B, L]` if rows are packed."""
    return value_U.unsqueeze(1) if documents is None else documents.broadcast(value_U)
