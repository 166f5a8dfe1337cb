"""Counter-based uniform random numbers: each number is a function of its key and index alone.

Every random quantity of a training step (noise level, masks, initial fast weights) is keyed by (seed, stream, step,
global sample id). So it is equal on every tensor-parallel rank and independent of the number of ranks and the order
of the rows. One exception: fast weights that all samples of a micro-batch share are keyed by its first sample. There is
no generator state to save, and a rank can compute a slice without the rest. A stateful generator per row would need a
Python loop over the batch.

Initial weights are keyed by (seed, stream, parameter, row), so that each rank draws its shard only.

The generator is SplitMix64 (Steele, Lea and Flood 2014) with random access: number `j` of key `k` is
`mix(k + (j + 1) * GAMMA)`. It uses integer arithmetic only, so CPU and GPU give the same bits.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Stream(IntEnum):
    """Independent random streams of one seed."""

    LEVEL = 1
    MASK = 2
    FAST_WEIGHTS = 3
    INNER_MASK = 4
    MEMORY = 5
    DECODING = 6
    LIKELIHOOD = 7
    WEIGHTS = 8
    ADAPTER_DROPOUT = 9
    FAST_WEIGHT_DROPOUT = 10
    FINGERPRINT = 11


def _signed(value: int) -> int:
    """Reinterpret the low 64 bits of `value` as an int64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # The generator needs a logical shift. int64 shifts are arithmetic, so the mask clears the sign bits.
    shifted = (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
    return x.bitwise_xor_(shifted)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of `x` in place.

    Working in place reuses cached memory: initial weights are then drawn as fast as with torch's generator.
    """
    x = _xor_shift(x, 30).mul_(_signed(_MULTIPLIERS[0]))
    x = _xor_shift(x, 27).mul_(_signed(_MULTIPLIERS[1]))
    return _xor_shift(x, 31)


def key(seed: int, stream: Stream, step: int | Tensor, ids: Tensor) -> Tensor:
    """Compute a 64-bit key for each entry of `ids`.

    Args:
        seed: seed of the run.
        stream: random stream.
        step: training step, or 0 for numbers that are the same in every step; a scalar, or one per entry of `ids`.
            For initial weights, the parameter's number.
        ids: int64 of any shape, such as global sample ids `[B]` or rows of a parameter.

    Returns:
        int64 tensor of the shape and on the device of `ids`.
    """
    state = torch.zeros_like(ids)
    for word in (seed, int(stream), step):
        offset = (word + 1) * _signed(_GAMMA) if isinstance(word, Tensor) else _signed((word + 1) * _GAMMA)
        state = _mix(state + offset)
    return _mix(state + (ids + 1) * _signed(_GAMMA))


def subkeys(keys: Tensor, index: Tensor) -> Tensor:
    """Compute a key for every key and index.

    Args:
        keys: int64 `[...]`.
        index: int64 `[n]`; `[..., n]` if they differ between keys.

    Returns:
        int64 `[..., n]` on the device of `keys`.
    """
    return _mix(keys.unsqueeze(-1) + (index + 1) * _signed(_GAMMA))


def uniform(keys: Tensor, index: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Compute the numbers `index` of every key, uniform on [0, 1).

    Args:
        keys: int64 `[...]`.
        index: int64 `[n]`, positions in the sequence of each key; `[..., n]` if they differ between keys.
        dtype: float64 uses 53 random bits, float32 uses 24.

    Returns:
        `[..., n]` of `dtype` on the device of `keys`.
    """
    bits = 53 if dtype == torch.float64 else 24
    return ((subkeys(keys, index) >> (64 - bits)) & ((1 << bits) - 1)).to(dtype) * 2.0**-bits


def symmetric(keys: Tensor, pair: Tensor) -> Tensor:
    """Compute the numbers `2 pair` and `2 pair + 1` of every key, uniform on (-1, 1) and symmetric about 0.

    Both come from one 64-bit number, which halves the cost of `uniform`. The values 0, -1 and 1 never occur.

    Args:
        keys: int64 `[...]`.
        pair: int64 `[n]`.

    Returns:
        `[..., 2 n]`, float32 with 24 random bits, on the device of `keys`.
    """
    return (subkeys(keys, pair).view(torch.int32) >> 8).to(torch.float32).add_(0.5).mul_(2.0**-23)


def words(keys: Tensor, group: Tensor) -> Tensor:
    """Compute the numbers `4 group` to `4 group + 3` of every key, uniform on the 65,536 values of an int16.

    All four come from one 64-bit number, the lowest bits first.

    Args:
        keys: int64 `[...]`.
        group: int64 `[n]`.

    Returns:
        int16 `[..., 4 n]` on the device of `keys`.
    """
    # Shifts, which keep the sign of each quarter: a view as int16, in one compiled graph with a LoRA adapter, makes
    # torch 2.13 write beyond a buffer on the CPU.
    up = torch.arange(48, -1, -16, device=keys.device)
    return ((subkeys(keys, group).unsqueeze(-1) << up) >> 48).to(torch.int16).flatten(-2)
