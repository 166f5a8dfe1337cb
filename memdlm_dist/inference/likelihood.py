"""Likelihood of a text under a masked diffusion model: the any-order bound, by Monte Carlo or exactly.

    log p(x | c) >= - sum_{k=1..l} E_{M, |M| = k} [ 1/k sum_{i in M} -log p(x_i | c, x without M) ]

over the sets M of k of the l tokens that are masked together (LLaDA, arXiv 2502.09992, its equation for evaluation);
an equality for a model whose conditionals are those of one joint distribution. A short text has few such sets, which
are then all computed.
"""

from itertools import combinations
from math import comb
from typing import NamedTuple

import torch

from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream


class Pass(NamedTuple):
    """One forward pass of one text.

    Attributes:
        masked: places of the text that are masked.
        weight: by which its sum of NLL counts; the weighted sums of all passes add up to the bound.
    """

    text: int
    masked: tuple[int, ...]
    weight: float


def passes(text: int, length: int, samples: int, seed: int) -> list[Pass]:
    """The forward passes by which a text of `length` tokens is scored.

    All sets of masked tokens if there are at most `samples` of them. Otherwise so many: their sizes are spread evenly
    over 1 .. length, which leaves less to chance than drawing them would; the tokens are drawn, keyed by (seed, text).
    """
    if length <= 20 and 2**length - 1 <= samples:
        sizes = range(1, length + 1)
        return [
            Pass(text, masked, 1 / (k * comb(length, k))) for k in sizes for masked in combinations(range(length), k)
        ]
    keys = keyed_random.key(seed, Stream.LIKELIHOOD, text, torch.arange(samples))
    u_SL = keyed_random.uniform(keys, torch.arange(1 + length))
    # One offset for all sizes, below 1 / samples of the range.
    place_S = (torch.arange(samples) + u_SL[0, 0]) / samples
    size_S = (place_S * length).long().clamp(max=length - 1) + 1
    order_SL = u_SL[:, 1:].argsort(1)
    return [
        Pass(text, tuple(order[: int(k)].tolist()), length / (int(k) * samples))
        for order, k in zip(order_SL, size_S, strict=True)
    ]
