"""Passes of a trained model for the sampler: whole rows or blocks of them, on any layout, with caches and fast weights.

Shapes: S slots, R rows of a pass, L tokens of a row (rounded up to the model's multiple), T tokens of a row in a pass,
K positions of a block, Z = cp_size * tp_size sequence shards, M positions of one shard in the head's input, n chosen
positions.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from memdlm_dist.inference.sampler import Reading
from memdlm_dist.method import fast_weight_tree
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loss import full_tensor
from memdlm_dist.models.attention import TokenContext, block_causal_mask
from memdlm_dist.models.key_value_cache import CachedPass, KeyValueCache
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.models.token_choice import TokenChoice
from memdlm_dist.runtime.transfer import PinnedTree

# Largest number of tokens in a product of the FFN, whose hidden states are 3 to 4 times as wide as the model.
FFN_TOKENS = 2**14


@dataclass(frozen=True)
class SequenceShards:
    """Division of rows among ranks: consecutive slices by context-parallel rank, and in these by tensor-parallel rank.

    Attributes:
        cp_group: process group of the context-parallel ranks; None for one.
    """

    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    cp_group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """Number of sequence shards, Z; it divides the length of every row."""
        return self.cp_size * self.tp_size

    def sum_over_cp(self, x: Tensor) -> Tensor:
        """Sum `x` over the context-parallel ranks, in place."""
        if self.cp_group is not None:
            dist.all_reduce(x, group=self.cp_group)
        return x


class _Details(NamedTuple):
    """Part of a plan that only the model's reader uses."""

    index_M: Tensor  # positions of the blocks in this rank's flattened activations
    mask: Tensor | None  # bool, broadcasts to [R, H, T, L]
    all_slots: bool  # the rows are all slots, in order


class ModelReader:
    """Reader that runs a backbone.

    Args:
        model: the backbone.
        slots: S.
        length: largest length of a row, a multiple of Z.
        device: device of the model.
        shards: division of the rows among ranks.
        cached: keep keys and values between passes, so that a pass can read blocks.
        shifted: the backbone predicts the next token.
        causal_block: tokens of a block of block-causal attention; None: full attention.
        guidance: scale of classifier-free guidance; 0 without.
        autocast: context of the passes.
        fast: fast weights, one set per slot; None without memory.
    """

    def __init__(
        self,
        model: LLaDA,
        slots: int,
        length: int,
        device: torch.device,
        shards: SequenceShards = SequenceShards(),
        *,
        cached: bool = False,
        shifted: bool = False,
        causal_block: int | None = None,
        guidance: float = 0.0,
        autocast: AbstractContextManager[Any] | None = None,
        fast: FastWeights | None = None,
    ):
        self.device, self.lookback, self.fast = device, int(shifted), fast
        self._model, self._slots, self._shards = model, slots, shards
        self._causal_block, self._guidance, self._autocast = causal_block, guidance, autocast or nullcontext()
        # With guidance the unconditional pass has its own keys and values.
        caches = (2 if guidance else 1) if cached else 0
        self._caches = [KeyValueCache(slots, length + 1) for _ in range(caches)]
        model.extend_rope(length)

    def plan(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        targets: Sequence[Sequence[int]],
        read: Sequence[range] | None,
    ) -> Reading:
        """Prepare passes over rows; see `sampler.Reader`."""
        shards = self._shards
        n_shards = shards.count
        length = -(-max(lengths) // n_shards) * n_shards
        firsts = [0] * len(slots) if read is None else [positions.start for positions in read]
        tokens = length if read is None else -(-max(map(len, read)) // n_shards) * n_shards
        index_ZM, row_RK = _head_index(
            [[p - self.lookback for p in block] for block in targets], firsts, tokens, n_shards
        )
        mine = slice(shards.cp_rank * shards.tp_size, (shards.cp_rank + 1) * shards.tp_size)
        offset = mine.start * index_ZM.shape[1]
        is_mine_RK = (row_RK >= offset) & (row_RK < offset + shards.tp_size * index_ZM.shape[1])
        position_RT = None
        if read is not None:
            spare = self._caches[0].length - 1
            position_RT = torch.tensor([[*p, *[spare] * (tokens - len(p))] for p in read])
        tensors = {
            "slot_R": torch.tensor(slots),
            "position_RT": position_RT,
            "row_RK": torch.where(is_mine_RK, row_RK - offset, -1),
            "index_M": index_ZM[shards.cp_rank * shards.tp_size + shards.tp_rank],
            "length_R": torch.tensor(lengths),
        }
        on_device: dict[str, Any] = PinnedTree(tensors, self.device).to_device()
        is_padded = min(lengths) < length
        mask = self._mask(on_device.pop("length_R"), length, on_device["position_RT"], is_padded)
        details = _Details(on_device.pop("index_M"), mask, list(slots) == list(range(self._slots)))
        return Reading(length=length, details=details, **on_device)

    def _mask(self, length_R: Tensor, length: int, position_RT: Tensor | None, is_padded: bool) -> Tensor | None:
        """Return the attention mask; None if every token attends to all, for the fastest kernels."""
        position_L = torch.arange(length, device=self.device)
        mask_R11L = (position_L < length_R.unsqueeze(1))[:, None, None]
        if self._causal_block is None:
            return mask_R11L if is_padded else None
        query_RT = position_L.unsqueeze(0) if position_RT is None else position_RT
        return mask_R11L & block_causal_mask(length, self._causal_block, query_RT)

    @torch.no_grad()
    def choose(self, reading: Reading, tokens_RT: Tensor, blank_RT: Tensor | None, choice: TokenChoice) -> Tensor:
        """Run a pass; see `sampler.Reader`."""
        choice, index_n = copy(choice), choice.index_n
        choice.index_n = index_n.clamp(min=0)  # a position of another context-parallel rank has no row here
        # Selected again in every pass: a plan that kept them would hold a copy of the fast weights.
        fast = self.fast
        if fast is not None and not reading.details.all_slots:
            fast = fast_weight_tree.select(fast, reading.slot_R, self._slots)
        if blank_RT is not None:
            hidden_ND = full_tensor(self._forward(reading, blank_RT, fast, "post_final_norm", self._caches[1:]))
            choice.guidance = (self._guidance, hidden_ND[choice.index_n])
        chosen_2n = self._forward(reading, tokens_RT, fast, choice, self._caches)
        if self._shards.cp_size == 1:
            return chosen_2n
        return self._shards.sum_over_cp(torch.where(index_n >= 0, chosen_2n, 0.0))

    def _forward(
        self,
        reading: Reading,
        tokens_RT: Tensor,
        fast: FastWeights | None,
        readout: Any,
        caches: Sequence[KeyValueCache],
    ) -> Tensor:
        details: _Details = reading.details
        context = self._context(reading, tokens_RT.shape[1])
        if caches:
            cached = CachedPass(caches[0], reading.slot_R, details.all_slots, reading.position_RT, reading.length)
            context = context._replace(cache=cached)
        if self._shards.cp_size > 1:
            tokens_RT = tokens_RT.chunk(self._shards.cp_size, dim=1)[self._shards.cp_rank]
        with self._autocast:
            return self._model(tokens_RT, details.index_M, fast, readout, context)

    def _context(self, reading: Reading, tokens: int) -> TokenContext:
        frequencies = self._model.freqs_cis
        if reading.position_RT is not None:
            frequencies = frequencies[reading.position_RT.clamp(max=len(frequencies) - 1)]
        else:
            width = tokens // self._shards.cp_size
            frequencies = frequencies[self._shards.cp_rank * width : (self._shards.cp_rank + 1) * width]
        return TokenContext(frequencies, reading.details.mask, ffn_tokens=FFN_TOKENS)

    @torch.no_grad()
    def idle(self) -> None:
        """Run a short pass whose result is not used."""
        tokens = self._shards.count
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        context = TokenContext(self._model.freqs_cis[: tokens // self._shards.cp_size])
        with self._autocast:
            self._model(zero.expand(1, tokens // self._shards.cp_size), zero, None, TokenChoice(zero, zero), context)


def _head_index(
    sources: Sequence[Sequence[int]], firsts: Sequence[int], tokens: int, shards: int
) -> tuple[Tensor, Tensor]:
    """Return where the head finds some positions: the activations that each shard selects, and their rows.

    Args:
        sources: positions per row.
        firsts: position of the first token that the pass reads of each row.
        tokens: T.
        shards: Z.

    Returns:
        Indices into each shard's flattened activations `[Z, M]`, padded with 0, and the row of each source in the
        concatenation of all shards `[R, K]`, padded with 0.
    """
    width = tokens // shards
    selected: list[list[int]] = [[] for _ in range(shards)]
    places = []
    for number, (row, first) in enumerate(zip(sources, firsts, strict=True)):
        of_row = []
        for position in row:
            shard, column = divmod(position - first, width)
            of_row.append((shard, len(selected[shard])))
            selected[shard].append(number * width + column)
        places.append(of_row)
    most = max(1, *map(len, selected))
    longest = max(map(len, places))
    row_RK = [[s * most + i for s, i in of_row] + [0] * (longest - len(of_row)) for of_row in places]
    return torch.tensor([x + [0] * (most - len(x)) for x in selected]), torch.tensor(row_RK)
