"""Cache of the attention's keys and values for decoding.

A full pass stores the keys and values of all tokens of its rows. A block pass computes those of some positions, stores
them, and attends to the whole rows. With bidirectional attention the entries of the other positions belong to an
earlier state of the row, so a block pass approximates a full pass (Fast-dLLM, arXiv 2505.22618).

Shapes: S slots (rows of the cache), W columns of a slot, B rows of a pass, L tokens of a row, T tokens of a row in a
block pass, H local key-value heads, d head dim.
"""

from typing import NamedTuple

from torch import Tensor


class KeyValueCache:
    """Keys and values of all layers, `[S, H, W, d]` each; a layer's are allocated at its first full pass.

    Args:
        slots: S.
        length: W. The last column is spare, for positions that only pad a block pass.
    """

    def __init__(self, slots: int, length: int):
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer; `like` has their number of heads, head dim, dtype and device."""
        if number not in self._layers:
            shape = (self.slots, like.shape[1], self.length, like.shape[3])
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]


class CachedPass(NamedTuple):
    """Use of the cache by one pass through the layers.

    Attributes:
        cache: the cache.
        slot_B: slots of the rows, int64.
        all_slots: the rows are all slots in order, so that nothing is gathered.
        position_BT: positions of the pass's tokens, int64; None in a full pass.
        length: L, number of positions that the pass attends to.
        number: number of the layer.
    """

    cache: KeyValueCache
    slot_B: Tensor
    all_slots: bool
    position_BT: Tensor | None
    length: int
    number: int = 0

    def update(self, k_BHTd: Tensor, v_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the pass's tokens; return those to attend to, `[B, H, L, d]` each."""
        k_SHWd, v_SHWd = self.cache.layer(self.number, v_BHTd)
        return self._update(k_SHWd, k_BHTd), self._update(v_SHWd, v_BHTd)

    def _update(self, stored_SHWd: Tensor, new_BHTd: Tensor) -> Tensor:
        if self.position_BT is None:
            target = stored_SHWd[:, :, : self.length]
            if self.all_slots:
                target.copy_(new_BHTd)
            else:
                target.index_copy_(0, self.slot_B, new_BHTd.type_as(target))
            return new_BHTd
        # Several tokens may have the spare position; which of them is stored does not matter.
        index = (self.slot_B.unsqueeze(1), self.position_BT)
        stored_SHWd.transpose(1, 2).index_put_(index, new_BHTd.transpose(1, 2).type_as(stored_SHWd))
        rows = stored_SHWd if self.all_slots else stored_SHWd.index_select(0, self.slot_B)
        return rows[:, :, : self.length].type_as(new_BHTd)
