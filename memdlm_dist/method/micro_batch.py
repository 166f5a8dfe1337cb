"""A micro-batch as model input: the corrupted tokens of every state, and the scored tokens.

Built on the host, before the copy to the device. So Python knows the number of masked tokens, and only scored
positions reach the output head, without a device-to-host sync.

Shapes: B rows, C rows that the inner loop reads, L tokens, U samples (rows, or documents of packed rows),
S = cp_size * tp_size sequence shards, P = B L/S tokens of one sequence shard, M scored tokens of one sequence shard
(with padding), N = S M scored tokens, K inner steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.method.documents import Documents, count_per_sample
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout
from memdlm_dist.method.sets import Sets
from memdlm_dist.method.trajectory import ANCHOR_INPUT, State
from memdlm_dist.runtime.transfer import PinnedTree

# Largest number of different values of M, see `gather_scored`.
_HEAD_SHAPES = 16


class Scored(NamedTuple):
    """Scored tokens of a state, gathered for the output head.

    Sequence shard s holds the activations of tokens [s L/S, (s+1) L/S) of every row. Each tensor-parallel rank selects
    M positions of its sequence shard, padding included. The head sees these positions of all tensor-parallel ranks,
    concatenated. Labels, weights and samples follow that concatenation and are equal on all these ranks.
    """

    index_SM: Tensor  # int64: position in the sequence shard's flattened [B * L/S] activations
    label_N: Tensor  # int64
    weight_N: Tensor  # float32: the sample's loss weight
    sample_N: Tensor  # int64
    valid_N: Tensor  # bool: False on padding
    count_U: Tensor  # int64: scored tokens of each sample, summed over all context-parallel ranks

    def cp_slice(self, cp_rank: int, cp_size: int) -> "Scored":
        """Return the scored tokens of a context-parallel rank's slice."""
        rows = slice(cp_rank * (size := len(self.index_SM) // cp_size), (cp_rank + 1) * size)

        def select(x_N: Tensor) -> Tensor:
            return x_N.view_as(self.index_SM)[rows].flatten()

        return Scored(
            self.index_SM[rows],
            select(self.label_N),
            select(self.weight_N),
            select(self.sample_N),
            select(self.valid_N),
            self.count_U,
        )


class InnerStep(NamedTuple):
    """One step of the inner loop: the inputs of student and teacher, and the scored tokens."""

    student: int  # index into `MicroBatch.inputs`
    teacher: int | None  # index into `MicroBatch.inputs`; None if the inner loss has no teacher
    scored: Scored


class MicroBatch(NamedTuple):
    """A micro-batch after noising: the outer loss's input and scored tokens, and those of the K inner steps.

    States with the same input number share one entry of `inputs`, and one trunk pass serves them. The inner loop may
    read some of the rows only: its states and scored tokens then cover these C rows. Under context parallelism,
    `inputs`, the scored tokens and `dropout` cover this rank's slice; the other fields describe the full rows.
    """

    # int64: corrupted tokens of a state. The anchor [B, L] comes first; the others are [C, L].
    inputs: tuple[Tensor, ...]
    anchor: Scored
    inner: tuple[InnerStep, ...]
    sample_ids_U: Tensor
    masked: Tensor  # number of tokens masked in the anchor, scalar
    maskable: Tensor  # number of maskable tokens, scalar
    samples: Tensor  # number of samples with a maskable token, scalar
    length: int  # of the full rows
    attended_BL: Tensor | None = None  # bool, tokens that attention may read; None: all
    documents: Documents | None = None  # documents of packed rows
    first: int = 0  # position in the full rows of the first token of `inputs`
    dropout: TermDropout = NO_DROPOUT  # of this rank's tokens
    inner_rows_C: Tensor | None = None  # int64: rows that the inner loop reads; None: all
    adapted_U: Tensor | None = None  # bool: samples that train with the memory; None: all

    def sets(self, samples_per_set: int | None) -> Sets:
        """Return the assignment of the samples to sets of fast weights; None: all share one."""
        return Sets(len(self.inputs[0]), self.slots, samples_per_set)

    @property
    def slots(self) -> int:
        """Number of document slots in a row; 1 without documents."""
        return self.documents.slots if self.documents is not None else 1

    def cp_slice(self, cp_rank: int, cp_size: int) -> "MicroBatch":
        """Return a context-parallel rank's slice: the rank's L / cp_size consecutive tokens of every row."""
        if cp_size == 1:
            return self
        width = self.length // cp_size
        positions = slice(cp_rank * width, (cp_rank + 1) * width)
        return self._replace(
            inputs=tuple(x_BL[:, positions] for x_BL in self.inputs),
            anchor=self.anchor.cp_slice(cp_rank, cp_size),
            inner=tuple(step._replace(scored=step.scored.cp_slice(cp_rank, cp_size)) for step in self.inner),
            first=positions.start,
            dropout=self.dropout.cp_slice(positions),
        )

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Move the tensors to the device in a single copy; the host does not wait for it."""
        moved: MicroBatch = PinnedTree(self, torch.device(device)).to_device()
        return moved


def micro_batch(
    tokens_BL: Tensor,
    maskable_BL: Tensor,
    sample_ids_U: Tensor,
    anchor: State,
    states: Sequence[State],
    mask_token_id: int,
    with_teacher: bool = False,
    sequence_shards: int = 1,
    shifted: bool = False,
    documents: Documents | None = None,
    dropout: TermDropout = NO_DROPOUT,
    inner_rows_C: Tensor | None = None,
    adapted_U: Tensor | None = None,
) -> MicroBatch:
    """Corrupt the clean tokens with the mask of every state, and gather the scored tokens.

    Args:
        tokens_BL: clean tokens x_0.
        maskable_BL: bool, tokens that may be masked.
        sample_ids_U: global sample ids.
        anchor: state of the outer loss.
        states: states of the inner loop, of the rows `inner_rows_C`.
        mask_token_id: id of `[MASK]`.
        with_teacher: the inner loss has a teacher, which reads the next state.
        sequence_shards: S; L must be divisible by it.
        shifted: the backbone predicts the next token; see `gather_scored`.
        documents: documents of packed rows.
        dropout: dropout of the low-rank terms.
        inner_rows_C: rows that the inner loop reads; None for all.
        adapted_U: samples that train with the memory; None for all.
    """
    inner_tokens, inner_documents = tokens_BL, documents
    if inner_rows_C is not None:
        inner_tokens = tokens_BL[inner_rows_C]
        inner_documents = documents.rows(inner_rows_C) if documents is not None else None
    # Input number -> mask, in the order of first use. The clean sequence has the number None and no mask.
    masks: dict[int | None, Tensor | None] = {ANCHOR_INPUT: anchor.mask_BL}
    for state in states:
        masks.setdefault(state.input_number, state.mask_BL)
        if with_teacher:
            masks.setdefault(state.next_input_number, state.next_BL)
    index = {number: i for i, number in enumerate(masks)}
    inner = tuple(
        InnerStep(
            student=index[state.input_number],
            teacher=index[state.next_input_number] if with_teacher else None,
            scored=gather_scored(state, inner_tokens, sequence_shards, shifted, inner_documents),
        )
        for state in states
    )

    def corrupt(number: int | None, mask: Tensor | None) -> Tensor:
        tokens = tokens_BL if number == ANCHOR_INPUT else inner_tokens
        return tokens if mask is None else torch.where(mask, mask_token_id, tokens)

    return MicroBatch(
        inputs=tuple(corrupt(number, mask) for number, mask in masks.items()),
        anchor=gather_scored(anchor, tokens_BL, sequence_shards, shifted, documents),
        inner=inner,
        sample_ids_U=sample_ids_U,
        masked=anchor.mask_BL.sum(),
        maskable=maskable_BL.sum(),
        samples=(count_per_sample(maskable_BL, documents) > 0).sum(),
        length=tokens_BL.shape[1],
        documents=documents,
        dropout=dropout,
        inner_rows_C=inner_rows_C,
        adapted_U=adapted_U,
    )


def gather_scored(
    state: State,
    tokens_BL: Tensor,
    sequence_shards: int = 1,
    shifted: bool = False,
    documents: Documents | None = None,
) -> Scored:
    """Gather positions, labels and weights of a state's scored tokens; see `Scored`.

    M is the largest number of scored tokens in a sequence shard, rounded up to a positive multiple of P/16. The
    head's input then has one of at most 16 shapes, for which DTensor and compilers cache their work, and is never
    empty.

    Args:
        shifted: the backbone predicts a token at the position before it, as backbones converted from autoregressive
            ones do. The gathered position is the one before the scored token. The first token of a sample has no
            position before it and must not be scored.
    """
    batch, length = tokens_BL.shape
    assert length % sequence_shards == 0, "the sequence length must be divisible by the number of sequence shards"
    width = length // sequence_shards
    target_BL, count_U = state.target_BL, count_per_sample(state.target_BL, documents)
    sample_BL = torch.arange(batch).unsqueeze(1).expand(batch, length) if documents is None else documents.sample_BL
    if shifted:
        target_BL, tokens_BL, sample_BL = (x.roll(-1, dims=1) for x in (target_BL, tokens_BL, sample_BL))

    def group_by_shard(x_BL: Tensor) -> Tensor:
        return x_BL.reshape(batch, sequence_shards, width).transpose(0, 1).reshape(sequence_shards, batch * width)

    target_SP = group_by_shard(target_BL)
    count_S = target_SP.sum(1)
    quantum = -(-batch * width // _HEAD_SHAPES)
    n_positions = quantum * max(1, -(-int(count_S.max()) // quantum))
    n_positions = min(n_positions, batch * width)
    index_SM = target_SP.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_positions]
    valid_SM = torch.arange(n_positions) < count_S.unsqueeze(1)
    sample_N = group_by_shard(sample_BL).gather(1, index_SM).flatten()
    return Scored(
        index_SM=index_SM,
        label_N=group_by_shard(tokens_BL).gather(1, index_SM).flatten(),
        weight_N=state.weight_U[sample_N],
        sample_N=sample_N,
        valid_N=valid_SM.flatten(),
        count_U=count_U,
    )
