"""Interface of a backbone, as the bi-level step uses it.

Shapes: B rows, L tokens, D model width, M scored tokens of one sequence shard, G sets of fast weights.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from memdlm_dist.method.documents import Documents
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.keyed_dropout import NO_DROPOUT, TermDropout


class FSDPSchedule(Protocol):
    """FSDP2 unshard and reshard schedule of a backbone; see `models.fsdp_schedule`."""

    def tail(self, first_layer: int) -> AbstractContextManager[None]:
        """Keep the tail's parameters unsharded until the outer backward pass has used them."""
        ...


class Backbone(Protocol):
    """Backbone interface of the bi-level step; implemented by `models.llada.LLaDA`.

    `context` is an opaque value: only the backbone reads it.
    """

    fsdp_schedule: FSDPSchedule

    def context(
        self,
        length: int,
        first: int = 0,
        attended_BL: Tensor | None = None,
        documents: Documents | None = None,
        documents_per_set: int | None = None,
        sequence_shard: tuple[int, int] = (0, 1),
        dropout: TermDropout = NO_DROPOUT,
    ) -> Any:
        """Build the per-token arguments of the layers for a micro-batch: positions, attention mask, sets, dropout.

        Args:
            length: L, tokens per row on this context-parallel rank.
            first: position of this rank's first token in the full row.
            attended_BL: bool, tokens of the full rows that attention may read; None for all.
            documents: documents of the full packed rows.
            documents_per_set: consecutive documents of a row that share a set of fast weights; None: the row has one.
            sequence_shard: (tp_rank, tp_size).
            dropout: dropout of the low-rank terms, for this context-parallel rank's tokens.
        """
        ...

    def __call__(
        self, tokens_BL: Tensor, index_M: Tensor, fast: FastWeights | None, readout: Any, context: Any
    ) -> Tensor:
        """Run the full model, and the head at positions `index_M` of this rank's flattened activations; see `tail`."""
        ...

    def trunk(self, inputs: Sequence[Tensor], stop: int, context: Any, others_context: Any = None) -> list[Tensor]:
        """Run the embedding and layers `0 .. stop - 1` on several inputs; return activations `[B, L, D]` of each.

        Only the first input's activations carry a gradient. The other inputs have a context of their own if they have
        other rows.
        """
        ...

    def tail(
        self,
        h_BLD: Tensor,
        start: int,
        index_M: Tensor,
        fast: FastWeights | None,
        readout: Any,
        context: Any,
        outer: bool = False,
    ) -> Tensor:
        """Run layers `start .. n - 1` on the trunk's activations, then the head at positions `index_M`.

        Args:
            readout: a `HeadLoss`, for losses `[G]`; or "logits"; or a `Hidden`, for hidden states.
            outer: True in the pass of the outer loss, False in passes of the inner loop.
        """
        ...

    def inner_steps(self, start: int) -> AbstractContextManager[None]:
        """Freeze layers `start .. n - 1`, final norm and head in this context: only fast weights get gradients."""
        ...
