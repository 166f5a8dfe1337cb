"""Likelihood bound of a text under a masked diffusion model, by Monte Carlo or exactly.

    log p(x | c) >= - sum_{k=1..l} E_{M, |M| = k} [ 1/k sum_{i in M} -log p(x_i | c, x without M) ]

x is the text, l its number of tokens, c its context, and M a set of k masked tokens (LLaDA, arXiv 2502.09992, equation
for evaluation). The bound equals log p(x | c) if the model's conditionals belong to one joint distribution. For a short
text all sets M are enumerated, so that the bound has no sampling error.

Shapes: S sampled sets, L tokens of the text; u_SL has one more column.
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
        text: index of the text.
        masked: positions of the masked tokens in the text.
        weight: weight of the pass's summed NLL; the weighted sums of all passes add up to the negative bound.
    """

    text: int
    masked: tuple[int, ...]
    weight: float


def passes(text: int, length: int, samples: int, seed: int) -> list[Pass]:
    """Return the forward passes that score a text of `length` tokens.

    There is one pass per set of masked tokens. If length is at most 20 and the 2**length - 1 possible sets are at most
    `samples`, all of them are used. Otherwise `samples` sets are drawn, keyed by (seed, text). Their tokens are random;
    their sizes are evenly spaced over 1 .. length, which gives less variance than random sizes.
    """
    if length <= 20 and 2**length - 1 <= samples:
        sizes = range(1, length + 1)
        return [
            Pass(text, masked, 1 / (k * comb(length, k))) for k in sizes for masked in combinations(range(length), k)
        ]
    keys = keyed_random.key(seed, Stream.LIKELIHOOD, text, torch.arange(samples))
    u_SL = keyed_random.uniform(keys, torch.arange(1 + length))
    # Evenly spaced fractions in [0, 1) with one common random offset below 1 / samples.
    fraction_S = (torch.arange(samples) + u_SL[0, 0]) / samples
    size_S = (fraction_S * length).long().clamp(max=length - 1) + 1
    order_SL = u_SL[:, 1:].argsort(1)
    return [
        Pass(text, tuple(order[: int(k)].tolist()), length / (int(k) * samples))
        for order, k in zip(order_SL, size_S, strict=True)
    ]
