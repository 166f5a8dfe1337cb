"""Rotary position embeddings (RoPE), and the base for a context beyond the pretrained one.

Shapes: B rows, L tokens, H heads, d head dim, j = d / 2 pairs of a head's dimensions.
"""

import math
from typing import Literal

import torch
from torch import Tensor

# Method of rescaling the RoPE base for a longer context; see `rescaled_base`.
RopeScaling = Literal["ntk", "diffusion_ntk"]


def rescaled_base(theta: float, rotary_dim: int, native_length: int, factor: float, method: RopeScaling) -> float:
    """Return the RoPE base for a context of s = `factor` times the native length T.

    d dimensions of a head are rotated.

    ntk: theta s^(d / (d - 2)). Over the longer context, the slowest pair rotates by the same angle as over the native
    one.

    diffusion_ntk (UltraLLaDA, arXiv 2510.10481): (2 s T / 2 pi)^(d / c). A bidirectional model was trained on relative
    positions from -T to T. Over this range the first c / 2 = ceil(d / 2 log_theta(2 T / 2 pi)) pairs make at least one
    full turn. The new base lets the next pair make one full turn over the longer context's range.
    """
    if factor == 1:
        return theta
    d = rotary_dim
    if method == "ntk":
        return float(theta * factor ** (d / (d - 2)))
    native = native_length / math.pi
    critical = 2 * math.ceil(d / 2 * math.log(native, theta))
    return float((factor * native) ** (d / critical))


def rotary_frequencies(rotary_dim: int, length: int, theta: float) -> Tensor:
    """Return the RoPE table exp(i p theta^(-2j/d)) for position p and pair j, complex64 `[L, d/2]`.

    The table is complex, as in torchtitan's llama3, so that mixed precision does not cast it below float32.
    """
    inverse = 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    angle = torch.outer(torch.arange(length).float(), inverse)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x_BLHd: Tensor, frequencies_Lj: Tensor) -> Tensor:
    """Apply RoPE in half-rotation form, in float32 or higher precision.

    The table's number of pairs decides how many of a head's first dimensions are rotated, d': those in the pairs
    (x_j, x_{j + d'/2}). The others stay as they are.
    """
    cos, sin = (component.unsqueeze(-2) for component in torch.view_as_real(frequencies_Lj).unbind(-1))
    x = x_BLHd.to(torch.promote_types(x_BLHd.dtype, torch.float32))
    pairs = frequencies_Lj.shape[-1]
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).type_as(x_BLHd)
