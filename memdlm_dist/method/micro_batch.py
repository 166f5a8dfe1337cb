"""A micro-batch as the model gets it: what it reads in every state, and which of its predictions are scored.

Made on the host, before the micro-batch goes to the device: the number of masked tokens is then known to Python, and
only masked positions need ever reach the output head, without a host-device synchronisation.

Shapes: B rows, L tokens, U samples (rows, or documents of packed rows), S sequence shards (context-parallel ranks, and
tensor-parallel ones within them), M scored tokens of one shard, N = S * M scored tokens in all, K inner steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.method.documents import Documents, count_per_sample
from memdlm_dist.method.trajectory import ANCHOR_INPUT, State
from memdlm_dist.runtime.transfer import PinnedTree

# Into how many sizes the number of scored positions is rounded.
_HEAD_SHAPES = 16


class Scored(NamedTuple):
    """The scored tokens of a state, gathered for the output head.

    Shard s holds the activations of tokens [s L/S, (s+1) L/S) of every row. Each tensor-parallel rank picks
    its own masked positions, M of them with padding, and the head sees the concatenation over these
    ranks; labels, weights and samples are those of the concatenation and equal on all of them.
    """

    index_SM: Tensor  # int64: position in the rank's flattened [B * L/S] activations
    label_N: Tensor  # int64
    weight_N: Tensor  # float32: the sample's weight
    sample_N: Tensor  # int64
    valid_N: Tensor  # bool: False on padding
    count_U: Tensor  # int64: scored tokens of each sample, on all context-parallel ranks

    def cp_slice(self, cp_rank: int, cp_size: int) -> "Scored":
        """Of so many consecutive parts of the shards, the tokens of one."""
        rows = slice(cp_rank * (size := len(self.index_SM) // cp_size), (cp_rank + 1) * size)

        def own(x_N: Tensor) -> Tensor:
            return x_N.view_as(self.index_SM)[rows].flatten()

        return Scored(
            self.index_SM[rows],
            own(self.label_N),
            own(self.weight_N),
            own(self.sample_N),
            own(self.valid_N),
            self.count_U,
        )


class InnerStep(NamedTuple):
    """One step of the inner loop: which of the micro-batch's inputs are read, and what is scored."""

    student: int
    teacher: int | None  # None where the inner loss has no teacher
    scored: Scored


class MicroBatch(NamedTuple):
    """A micro-batch with its noise drawn: the outer loss's view and the K inner ones.

    States that are the same share one entry of `inputs`, so that one pass of the trunk serves them.
    """

    inputs: tuple[Tensor, ...]  # int64 [B, L] each: what the model may read; the anchor comes first
    anchor: Scored
    inner: tuple[InnerStep, ...]
    sample_ids_U: Tensor
    masked: Tensor  # number of tokens that the anchor masks, scalar: of the whole rows
    maskable: Tensor  # and of those that may be masked
    length: int  # of the whole rows
    attended_BL: Tensor | None = None  # bool, the tokens that are attended to; None: all
    documents: Documents | None = None  # of the whole rows, where these are packed
    first: int = 0  # which token of the whole rows comes first here

    def cp_slice(self, cp_rank: int, cp_size: int) -> "MicroBatch":
        """What a context-parallel rank has of it: one of so many consecutive parts of every row."""
        if cp_size == 1:
            return self
        width = self.length // cp_size
        columns = slice(cp_rank * width, (cp_rank + 1) * width)
        return self._replace(
            inputs=tuple(x_BL[:, columns] for x_BL in self.inputs),
            anchor=self.anchor.cp_slice(cp_rank, cp_size),
            inner=tuple(step._replace(scored=step.scored.cp_slice(cp_rank, cp_size)) for step in self.inner),
            first=columns.start,
        )

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Copy to the device, in one copy that the host does not wait for."""
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
) -> MicroBatch:
    """Corrupt the clean tokens by every state and gather what is scored.

    Args:
        tokens_BL: clean tokens.
        maskable_BL: bool, the tokens that may be masked.
        sample_ids_U: global sample ids.
        anchor: the state of the outer loss.
        states: those of the inner loop.
        mask_token_id: what a masked token is shown as.
        with_teacher: the inner loss compares with a prediction from the next state.
        shards: number of sequence shards S, by which L must be divisible.
        shifted: the backbone predicts the next token; see `gather_scored`.
        documents: of packed rows.
    """
    # State's number of an input -> its mask, in the order of their first use; None, the clean sequence, has no mask.
    masks: dict[int | None, Tensor | None] = {ANCHOR_INPUT: anchor.mask_BL}
    for state in states:
        masks.setdefault(state.reads, state.mask_BL)
        if with_teacher:
            masks.setdefault(state.next_reads, state.next_BL)
    place = {number: i for i, number in enumerate(masks)}
    inner = tuple(
        InnerStep(
            student=place[state.reads],
            teacher=place[state.next_reads] if with_teacher else None,
            scored=gather_scored(state, tokens_BL, sequence_shards, shifted, documents),
        )
        for state in states
    )
    return MicroBatch(
        inputs=tuple(
            tokens_BL if mask_BL is None else torch.where(mask_BL, mask_token_id, tokens_BL)
            for mask_BL in masks.values()
        ),
        anchor=gather_scored(anchor, tokens_BL, sequence_shards, shifted, documents),
        inner=inner,
        sample_ids_U=sample_ids_U,
        masked=anchor.mask_BL.sum(),
        maskable=maskable_BL.sum(),
        length=tokens_BL.shape[1],
        documents=documents,
    )


def gather_scored(
    state: State,
    tokens_BL: Tensor,
    sequence_shards: int = 1,
    shifted: bool = False,
    documents: Documents | None = None,
) -> Scored:
    """Positions, labels and weights of a state's targets; see `Scored`.

    A backbone that was converted from an autoregressive one predicts a token at the position before it
    (`shifted`): that position is picked. The first token of a sample, which has none before it, cannot be a
    target then.

    M is the largest number of targets in one shard, rounded up to a sixteenth of its tokens: the head then
    sees few different shapes, which DTensor and compilers keep the preparation of; and never runs on nothing.
    """
    batch, length = tokens_BL.shape
    assert length % sequence_shards == 0, "the sequence length must be divisible by the number of shards"
    width = length // sequence_shards
    target_BL, count_U = state.target_BL, count_per_sample(state.target_BL, documents)
    sample_BL = torch.arange(batch).unsqueeze(1).expand(batch, length) if documents is None else documents.sample_BL
    if shifted:
        target_BL, tokens_BL, sample_BL = (x.roll(-1, dims=1) for x in (target_BL, tokens_BL, sample_BL))

    def by_shard(x_BL: Tensor) -> Tensor:
        return x_BL.reshape(batch, sequence_shards, width).transpose(0, 1).reshape(sequence_shards, batch * width)

    target_SP = by_shard(target_BL)
    count_S = target_SP.sum(1)
    quantum = -(-batch * width // _HEAD_SHAPES)
    slots = quantum * max(1, -(-int(count_S.max()) // quantum))
    slots = min(slots, batch * width)
    index_SM = target_SP.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    valid_SM = torch.arange(slots) < count_S.unsqueeze(1)
    sample_N = by_shard(sample_BL).gather(1, index_SM).flatten()
    return Scored(
        index_SM=index_SM,
        label_N=by_shard(tokens_BL).gather(1, index_SM).flatten(),
        weight_N=state.weight_U[sample_N],
        sample_N=sample_N,
        valid_N=valid_SM.flatten(),
        count_U=count_U,
    )
