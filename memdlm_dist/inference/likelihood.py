"""Likelihood bound of a text under a masked diffusion model, by Monte Carlo or exactly.

    log p(x | c) >= - sum_{k=1..l} E_{M, |M| = k} [ 1/k sum_{i in M} -log p(x_i | c, x without M) ]

M is the set of the k masked tokens out of l (LLaDA, arXiv 2502.09992, its equation for evaluation). The bound is an
equality if the model's conditionals belong to one joint distribution. A short text has few sets M; all of them are then
computed, which makes the bound exact.
"""

from itertools import combinations
from math import comb
from typing import NamedTuple

import torch

from memdlm_dist.method import keyed_random
from memdlm_dist.method.keyed_random import Stream


class Pass(NamedTuple):
    """Forward pass of one text with one set of masked tokens.

    Attributes:
        text: number of the text.
        masked: positions of the masked tokens in the text.
        weight: weight of the pass's summed NLL; the weighted sums of all passes add up to the negative bound.
    """

    text: int
    masked: tuple[int, ...]
    weight: float


def passes(text: int, length: int, samples: int, seed: int) -> list[Pass]:
    """Return the forward passes that score a text of `length` tokens.

    These are all sets of masked tokens if at most `samples` exist. Otherwise `samples` sets are drawn, keyed by
    (seed, text): their sizes are spread evenly over 1 .. length, for less variance than random sizes, and their tokens
    are random.
    """
    if length <= 20 and 2**length - 1 <= samples:
        sizes = range(1, length + 1)
        return [
            Pass(text, masked, 1 / (k * comb(length, k))) for k in sizes for masked in combinations(range(length), k)
        ]
    keys = keyed_random.key(seed, Stream.LIKELIHOOD, text, torch.arange(samples))
    u_SL = keyed_random.uniform(keys, torch.arange(1 + length))
    # All sizes share one random offset, below 1 / samples of the range.
    fraction_S = (torch.arange(samples) + u_SL[0, 0]) / samples
    size_S = (fraction_S * length).long().clamp(max=length - 1) + 1
    order_SL = u_SL[:, 1:].argsort(1)
    return [
        Pass(text, tuple(order[: int(k)].tolist()), length / (int(k) * samples))
        for order, k in zip(order_SL, size_S, strict=True)
    ]
