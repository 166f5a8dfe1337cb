"""Uniform numbers that are a function of their key alone.

Every random quantity of a training step (noise level, masks, the draw of the fast weights) is keyed by
(seed, stream, step, global sample id). So it is the same on every tensor-parallel rank, the same for
any number of ranks and any order of the rows, there is no generator state to save, and a slice can be
computed without the rest. A stateful generator per row would need a Python loop over the batch.

Initial weights are keyed by (seed, stream, parameter, row), so that a rank draws its shard alone.

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
    WEIGHTS = 8


def _signed(value: int) -> int:
    """The int64 whose 64 bits are those of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts arithmetically; the mask makes it the logical shift that the generator needs.
    shifted = (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
    return x.bitwise_xor_(shifted)


def _mix(x: Tensor) -> Tensor:
    """Mix in place, in memory that is read again at once: weights are drawn at the speed of torch's generator."""
    x = _xor_shift(x, 30).mul_(_signed(_MULTIPLIERS[0]))
    x = _xor_shift(x, 27).mul_(_signed(_MULTIPLIERS[1]))
    return _xor_shift(x, 31)


def key(seed: int, stream: Stream, step: int | Tensor, ids: Tensor) -> Tensor:
    """One 64-bit key for each entry of `ids`.

    Args:
        seed: the run's seed.
        stream: which family of numbers.
        step: training step, 0 for numbers that stay fixed; one for each entry of `ids`, or one for all. Of initial
            weights, the parameter's number.
        ids: int64 tensor of any shape, for instance the global sample ids `[B]`, or rows of a parameter.

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


def symmetric(keys: Tensor, pair: Tensor) -> Tensor:
    """Numbers `2 pair` and `2 pair + 1` of every key, uniform on (-1, 1) and symmetric about 0.

    The two halves of one 64-bit number, hence half the mixing of `uniform`. Neither 0 nor an end occurs.

    Args:
        keys: int64 `[...]`.
        pair: int64 `[n]`.

    Returns:
        `[..., 2 n]`, float32 with 24 random bits, on the device of `keys`.
    """
    mixed = _mix(keys.unsqueeze(-1) + (pair + 1) * _signed(_GAMMA))
    return (mixed.view(torch.int32) >> 8).to(torch.float32).add_(0.5).mul_(2.0**-23)
