"""Dropout whose mask is a function of keys: equal in all passes of a step, on every layout and after a resume.

Inverted dropout, applied to the inputs of low-rank terms only, as in PEFT: y = W x + (alpha / R) B A drop(x) with
drop(x) = m x / (1 - p). The mask m is keyed by (seed, stream, step, sample id, position in the sample, layer, linear,
expert) and the input feature. Trunk, inner steps, teacher and outer step therefore see one mask, and activation
checkpointing recomputes it.

Four features share one 64-bit number, so the probability is resolved to 1/65,536.

Shapes: B rows, L tokens per row on this context-parallel rank, S slots of experts, i input features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from memdlm_dist.method import keyed_random
from memdlm_dist.method.documents import Documents
from memdlm_dist.method.keyed_random import Stream

_VALUES = 2**16  # different values of a draw
# Distances between the keys of a token's layers and experts; a linear's number within its layer is smaller.
_LAYER, _EXPERT = 2**32, 2**16


class Dropout(NamedTuple):
    """Dropout with one key per token."""

    key_BL: Tensor  # int64; `[S]` for the slots of experts
    probability: float

    @classmethod
    def draw(
        cls,
        seed: int,
        stream: Stream,
        step: int,
        sample_ids_U: Tensor,
        length: int,
        documents: Documents | None,
        probability: float,
    ) -> "Dropout | None":
        """Build the dropout of a micro-batch in a training step; None if the probability is 0.

        Args:
            sample_ids_U: global sample ids.
            length: tokens of a whole row.
            documents: documents of packed rows. A packed document gets the masks that it would get alone in a row.
        """
        if not probability:
            return None
        key_U = keyed_random.key(seed, stream, step, sample_ids_U)
        if documents is None:
            return cls(keyed_random.subkeys(key_U, torch.arange(length)), probability)
        position_BL1 = documents.position_BL.unsqueeze(-1)
        return cls(keyed_random.subkeys(documents.broadcast(key_U), position_BL1).squeeze(-1), probability)

    def at_layer(self, layer: int) -> "Dropout":
        """Return the dropout of a layer."""
        return self._replace(key_BL=self.key_BL + _LAYER * layer)

    def at_linear(self, number: int) -> "Dropout":
        """Return the dropout of a layer's linear.

        Args:
            number: number of the linear within its layer.
        """
        return self._replace(key_BL=self.key_BL + number)

    def at_slots(self, slot_S: Tensor, expert_Nk: Tensor) -> "Dropout":
        """Return the dropout of slots of experts; a token gets another mask in each of its experts.

        Args:
            slot_S: index of each slot in the flattened (N, k) pairs of N = B L tokens and their experts.
            expert_Nk: numbers of the tokens' experts.
        """
        key_S = self.key_BL.flatten()[slot_S // expert_Nk.shape[1]]
        return self._replace(key_BL=key_S + _EXPERT * expert_Nk.flatten()[slot_S])

    def cp_slice(self, positions: slice) -> "Dropout":
        """Return the dropout of these positions of every row."""
        return self._replace(key_BL=self.key_BL[:, positions])

    def rows(self, index_C: Tensor) -> "Dropout":
        """Return the dropout of some rows."""
        return self._replace(key_BL=self.key_BL[index_C])

    def __call__(self, x_BLi: Tensor, first: int = 0) -> Tensor:
        """Drop features of the tokens, and scale the others by 1 / (1 - p).

        Args:
            x_BLi: inputs of a linear. A DTensor may be replicated, or sharded on the features.
            first: number of the first feature of a plain tensor that is a tensor-parallel shard.
        """
        dropped = min(round(self.probability * _VALUES), _VALUES - 1)
        scale = _VALUES / (_VALUES - dropped)
        if not isinstance(x_BLi, DTensor):
            return x_BLi * self._kept(first, x_BLi.shape[-1], dropped) * scale
        local = x_BLi.to_local()
        if x_BLi.placements[0].is_shard(x_BLi.ndim - 1):
            first = x_BLi.device_mesh.get_local_rank() * local.shape[-1]
        kept = DTensor.from_local(
            self._kept(first, local.shape[-1], dropped), x_BLi.device_mesh, x_BLi.placements, run_check=False
        )
        return x_BLi * kept * scale

    def _kept(self, first: int, features: int, dropped: int) -> Tensor:
        """Return the mask m, bool `[B, L, features]`, of consecutive features from `first` on.

        Args:
            dropped: number of the 65,536 values that drop a feature.
        """
        group = torch.arange(first // 4, -(-(first + features) // 4), device=self.key_BL.device)
        values = keyed_random.words(self.key_BL, group)[..., first % 4 : first % 4 + features]
        return values >= dropped - _VALUES // 2


class TermDropout(NamedTuple):
    """Dropouts of the two kinds of low-rank terms."""

    adapters: Dropout | None = None  # outer LoRA adapters; None: no dropout
    fast_weights: Dropout | None = None  # fast weights of either type; None: no dropout

    def at_layer(self, layer: int) -> "TermDropout":
        """Return the dropouts of a layer."""
        return self._each(lambda dropout: dropout.at_layer(layer))

    def at_linear(self, number: int) -> "TermDropout":
        """Return the dropouts of a layer's linear."""
        return self._each(lambda dropout: dropout.at_linear(number))

    def at_slots(self, slot_S: Tensor, expert_Nk: Tensor) -> "TermDropout":
        """Return the dropouts of slots of experts; see `Dropout.at_slots`."""
        return self._each(lambda dropout: dropout.at_slots(slot_S, expert_Nk))

    def keys(self) -> list[Tensor]:
        """Return the keys of the dropouts that there are."""
        return [dropout.key_BL for dropout in self if dropout is not None]

    def with_keys(self, keys: Sequence[Tensor]) -> "TermDropout":
        """Return these dropouts with other keys, in the order of `keys`."""
        new = iter(keys)
        return self._each(lambda dropout: dropout._replace(key_BL=next(new)))

    def cp_slice(self, positions: slice) -> "TermDropout":
        """Return the dropouts of these positions of every row."""
        return self._each(lambda dropout: dropout.cp_slice(positions))

    def rows(self, index_C: Tensor) -> "TermDropout":
        """Return the dropouts of some rows."""
        return self._each(lambda dropout: dropout.rows(index_C))

    def _each(self, change: Callable[[Dropout], Dropout]) -> "TermDropout":
        return TermDropout(*(None if dropout is None else change(dropout) for dropout in self))


NO_DROPOUT = TermDropout()
