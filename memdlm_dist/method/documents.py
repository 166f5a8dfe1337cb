"""Documents of packed rows.

Each document is a sample: its tokens attend only to each other, its positions start at 0, and it has its own noise
level, mask ratios and fast weights.

Every row has S document slots, some of them empty. So a micro-batch has B S samples in a fixed order: slot s of row b
is sample b S + s.

Shapes: B rows, L tokens per row, T = B L tokens, S document slots per row, U = B S samples,
P rows of the buffer of a grouped matrix product, i and o input and output features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.errors import require

# Document number of padding tokens.
PADDING = -1

# Step between the sample ids of consecutive documents of a row. The first document has the row's id, and a data set
# has fewer rows than this step, so that no two ids are equal.
_ID_STRIDE = 2**40

# The weight gradients of grouped matrix products need group sizes that are a multiple of 8 rows. No group may be empty:
# some accelerators leave the weight gradient of an empty group undefined (pytorch/pytorch#172439).
GROUP_ROWS = 8


class GroupedTokens(NamedTuple):
    """Layout of a micro-batch's tokens in a `[P, i]` buffer for grouped matrix products: one group per slot.

    Each group is padded to a positive multiple of `GROUP_ROWS` buffer rows, even if its slot is empty. P depends on
    the shapes only, never on the lengths of the documents.
    """

    row_T: Tensor  # int64: buffer row of every token
    offsets_U: Tensor  # int32: end of every sample's group; the last group takes all remaining buffer rows
    n_rows: int  # P

    def scatter(self, x_BLi: Tensor) -> Tensor:
        """Copy the tokens into the buffer, `[P, i]`; padding is zero."""
        x_Ti = x_BLi.flatten(0, 1)
        return x_Ti.new_zeros(self.n_rows, x_Ti.shape[1]).index_copy(0, self.row_T, x_Ti)

    def gather(self, y_Po: Tensor, rows: int) -> Tensor:
        """Copy the tokens back from the buffer, `[B, L, o]`.

        Args:
            rows: B.
        """
        return y_Po.index_select(0, self.row_T).unflatten(0, (rows, -1))


class SetAssignment(NamedTuple):
    """Assignment of tokens to the s sets of fast weights of their row."""

    slot_BL: Tensor  # int64: number of the set within its row
    slots: int  # s
    # Layout for grouped products of all tokens, and of this tensor-parallel rank's sequence shard. None: no grouped
    # products.
    grouped: GroupedTokens | None = None
    grouped_shard: GroupedTokens | None = None

    def mask(self) -> Tensor:
        """Return the one-hot assignment, bool `[B, L, s]`: True at the token's set."""
        return self.slot_BL.unsqueeze(-1) == torch.arange(self.slots, device=self.slot_BL.device)


class Documents(NamedTuple):
    """Document number and position of every token of packed rows."""

    number_BL: Tensor  # int64: 0, 1, ... along the row, `PADDING` after the last document
    position_BL: Tensor  # int64: position within the document
    slots: int  # S, at least the number of documents in any row

    @classmethod
    def from_numbers(cls, number_BL: Tensor, slots: int | None = None) -> "Documents":
        """Build the documents of packed rows from the tokens' document numbers.

        Args:
            slots: S; None for the smallest power of two that is enough for these rows.

        Raises:
            UserError: if a row holds more documents than `slots`.
        """
        n_documents = int(number_BL.max().clamp(min=0)) + 1
        require(
            slots is None or n_documents <= slots,
            f"A row of the shards holds {n_documents} documents, more than most_documents in their memdlm.json; "
            "prepare the data again.",
        )
        column_L = torch.arange(number_BL.shape[1])
        is_first_BL = torch.ones_like(number_BL, dtype=torch.bool)
        is_first_BL[:, 1:] = number_BL[:, 1:] != number_BL[:, :-1]
        start_BL = torch.where(is_first_BL, column_L, 0).cummax(1).values
        return cls(number_BL, column_L - start_BL, slots or power_of_two(n_documents))

    @property
    def slot_BL(self) -> Tensor:
        """Slot of every token, int64 `[B, L]`.

        Padding tokens get the last slot. They do not affect its fast weights, because they are never scored.
        """
        return torch.where(self.number_BL == PADDING, self.slots - 1, self.number_BL)

    @property
    def sample_BL(self) -> Tensor:
        """Sample number of every token, int64 `[B, L]`."""
        first_B1 = self.slots * torch.arange(len(self.number_BL), device=self.number_BL.device).unsqueeze(1)
        return first_B1 + self.slot_BL

    def ids(self, row_ids_B: Tensor) -> Tensor:
        """Return the global sample ids, int64 `[U]`."""
        return (row_ids_B.unsqueeze(1) + _ID_STRIDE * torch.arange(self.slots)).flatten()

    def count_per_sample(self, chosen_BL: Tensor) -> Tensor:
        """Count the chosen tokens of every sample, int64 `[U]`."""
        zeros_U = torch.zeros(len(self.number_BL) * self.slots, dtype=torch.int64)
        return zeros_U.index_add(0, self.sample_BL.flatten(), chosen_BL.flatten().long())

    def broadcast(self, value_U: Tensor) -> Tensor:
        """Broadcast a per-sample value to the sample's tokens, `[B, L]`."""
        return value_U[self.sample_BL]

    def rank_within_sample(self, u_BL: Tensor) -> Tensor:
        """Rank every token by u among the tokens of its sample, int64 `[B, L]`; 0 is the smallest u."""
        sample_T = self.sample_BL.flatten()
        order_T = u_BL.flatten().argsort()
        order_T = order_T[sample_T[order_T].argsort(stable=True)]  # by sample, then by u
        size_U = self.count_per_sample(torch.ones_like(self.number_BL))
        offset_U = size_U.cumsum(0) - size_U
        rank_T = torch.empty_like(order_T)
        rank_T[order_T] = torch.arange(len(order_T)) - offset_U[sample_T[order_T]]
        return rank_T.view_as(u_BL)

    def cu_seqlens(self) -> Tensor:
        """Return the cumulative sequence lengths for variable-length attention, int32 `[B (S + 1) + 1]`; starts with 0.

        Each row contributes S + 1 sequences: its slots, empty ones included, and its padding. No device-to-host sync.
        """
        number_BL = torch.where(self.number_BL == PADDING, self.slots, self.number_BL)
        first_B1 = (self.slots + 1) * torch.arange(len(number_BL), device=number_BL.device).unsqueeze(1)
        sequence_T = (first_B1 + number_BL).flatten()
        length_n = torch.zeros(len(number_BL) * (self.slots + 1) + 1, dtype=torch.int64, device=number_BL.device)
        return length_n.index_add(0, sequence_T + 1, torch.ones_like(sequence_T)).cumsum(0).int()

    def mean_attended(self) -> float:
        """Return the mean number of tokens that a token attends to; a row's padding counts as one document.

        Needs a device-to-host sync if the documents are on a device.
        """
        is_last_BL = torch.ones_like(self.number_BL, dtype=torch.bool)
        is_last_BL[:, :-1] = self.number_BL[:, :-1] != self.number_BL[:, 1:]
        sizes = (self.position_BL[is_last_BL] + 1).double()
        return float(sizes.square().sum()) / self.number_BL.numel()

    def slice(self, first: int, length: int) -> "Documents":
        """Return the documents of tokens `first .. first + length - 1` of each row; positions are kept."""
        columns = slice(first, first + length)
        return self._replace(number_BL=self.number_BL[:, columns], position_BL=self.position_BL[:, columns])

    def rows(self, index_C: Tensor) -> "Documents":
        """Return the documents of some rows."""
        return self._replace(number_BL=self.number_BL[index_C], position_BL=self.position_BL[index_C])

    def grouped_by(self, samples_per_set: int) -> "Documents":
        """Return groups of consecutive documents as documents; positions are kept."""
        if samples_per_set == 1:
            return self
        number_BL = torch.where(self.number_BL == PADDING, PADDING, self.number_BL // samples_per_set)
        return self._replace(number_BL=number_BL, slots=-(-self.slots // samples_per_set))

    def assign_sets(self, grouped: bool = False, tp_rank: int = 0, tp_size: int = 1) -> SetAssignment:
        """Assign every token to the set of fast weights of its slot, without a device-to-host sync.

        Args:
            grouped: include the layouts for grouped products.
            tp_rank: tensor-parallel rank, which selects the sequence shard.
            tp_size: tensor-parallel degree.
        """
        if not grouped:
            return SetAssignment(self.slot_BL, self.slots)
        all_tokens, width = self.grouped(), self.number_BL.shape[1] // tp_size
        sequence_shard = all_tokens if tp_size == 1 else self.slice(tp_rank * width, width).grouped()
        return SetAssignment(self.slot_BL, self.slots, all_tokens, sequence_shard)

    def grouped(self) -> GroupedTokens:
        """Compute the layout of the tokens for grouped products; a sample's tokens are contiguous already."""
        sample_T = self.sample_BL.flatten()
        tokens, samples = len(sample_T), len(self.number_BL) * self.slots
        size_U = torch.zeros(samples, dtype=torch.int64, device=sample_T.device)
        size_U = size_U.index_add(0, sample_T, torch.ones_like(sample_T))
        rows_U = (size_U + GROUP_ROWS - 1).clamp(min=GROUP_ROWS) // GROUP_ROWS * GROUP_ROWS
        offsets_U = rows_U.cumsum(0)
        shift_U = (offsets_U - rows_U) - (size_U.cumsum(0) - size_U)
        row_T = torch.arange(tokens, device=sample_T.device) + shift_U[sample_T]
        n_rows = -(-tokens // GROUP_ROWS) * GROUP_ROWS + GROUP_ROWS * samples
        offsets_U[-1:] = n_rows
        return GroupedTokens(row_T, offsets_U.int(), n_rows)


def power_of_two(number: int) -> int:
    """Return the smallest power of two >= `number`, for `number` >= 1."""
    return 1 << (number - 1).bit_length()


def count_per_sample(chosen_BL: Tensor, documents: Documents | None) -> Tensor:
    """Count the chosen tokens of every sample, int64 `[U]`; a sample is a row if rows are not packed."""
    return chosen_BL.sum(1) if documents is None else documents.count_per_sample(chosen_BL)


def broadcast_to_tokens(value_U: Tensor, documents: Documents | None) -> Tensor:
    """Broadcast a per-sample value to the sample's tokens: `[B, 1]`, or `[B, L]` if rows are packed."""
    return value_U.unsqueeze(1) if documents is None else documents.broadcast(value_U)
