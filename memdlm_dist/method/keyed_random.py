"""Uniform numbers that are a function of their key alone.

Every random quantity of a training step (noise level, masks, the draw of the fast weights) is keyed by
(seed, stream, step, global sample id). So it is the same on every tensor-parallel rank, the same for
any number of ranks and any order of the rows, there is no generator state to save, and a slice can be
computed without the rest. A stateful generator per row would need a Python loop over the batch.

The generator is SplitMix64 (Steele, Lea and Flood 2014) read at random positions: number `j` of a key
`k` is `mix(k + (j + 1) * GAMMA)`. It is integer arithmetic, hence the same on CPU and GPU.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Stream(IntEnum):
    """Independent families of numbers under one seed."""

    LEVEL = 1
    MASK = 2
    FAST_WEIGHTS = 3
    INNER_MASK = 4
    MEMORY = 5
    DECODING = 6
    LIKELIHOOD = 7


def _signed(value: int) -> int:
    """The int64 whose 64 bits are those of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts arithmetically; the mask makes it the logical shift that the generator needs.
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _mix(x: Tensor) -> Tensor:
    x = _xor_shift(x, 30) * _signed(_MULTIPLIERS[0])
    x = _xor_shift(x, 27) * _signed(_MULTIPLIERS[1])
    return _xor_shift(x, 31)


def key(seed: int, stream: Stream, step: int | Tensor, ids: Tensor) -> Tensor:
    """One 64-bit key for each entry of `ids`.

    Args:
        seed: the run's seed.
        stream: which family of numbers.
        step: training step, 0 for numbers that stay fixed; one for each entry of `ids`, or one for all.
        ids: int64 tensor of any shape, for instance the global sample ids `[B]`.

    Returns:
        int64 tensor of the shape and on the device of `ids`.
    """
    state = torch.zeros_like(ids)
    for word in (seed, int(stream), step):
        offset = (word + 1) * _signed(_GAMMA) if isinstance(word, Tensor) else _signed((word + 1) * _GAMMA)
        state = _mix(state + offset)
    return _mix(state + (ids + 1) * _signed(_GAMMA))


def uniform(keys: Tensor, index: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers `index` of every key, uniform on [0, 1).

    Args:
        keys: int64 `[...]`.
        index: int64 `[n]`, which numbers of each key's sequence.
        dtype: float64 takes 53 random bits, float32 takes 24.

    Returns:
        `[..., n]` of `dtype` on the device of `keys`.
    """
    bits = 53 if dtype == torch.float64 else 24
    mixed = _mix(keys.unsqueeze(-1) + (index + 1) * _signed(_GAMMA))
    return ((mixed >> (64 - bits)) & ((1 << bits) - 1)).to(dtype) * 2.0**-bits
