"""Reader for the sampler that answers from a function of the tokens instead of a backbone."""

from typing import NamedTuple

import torch

from memdlm_dist.inference.sampler import Reading
from memdlm_dist.models.token_choice import choose


class _Details(NamedTuple):
    lengths: list
    positions: torch.Tensor  # of the head's input: (row, position) pairs


class ToyReader:
    """Reader whose logits are a function of the rows' tokens.

    Args:
        predict: (rows as lists of tokens without padding, (row, position) pairs) -> logits `[N, V]`.
        guidance: scale of classifier-free guidance.
        lookback: see `Reader`.
    """

    device = torch.device("cpu")

    def __init__(self, predict, guidance=0.0, lookback=0):
        self.predict, self.guidance, self.lookback = predict, guidance, lookback
        self.passes, self.idle_passes, self.read = [], 0, []

    def plan(self, slots, lengths, targets, read):
        pairs = [(row, position) for row, block in enumerate(targets) for position in block]
        numbers = {pair: number for number, pair in enumerate(pairs)}
        longest = max(map(len, targets))
        row_RK = [
            [numbers.get((row, p), 0) for p in block] + [0] * (longest - len(block))
            for row, block in enumerate(targets)
        ]
        self.read.append(read)
        return Reading(torch.tensor(slots), None, max(lengths), torch.tensor(row_RK), _Details(list(lengths), pairs))

    def choose(self, reading, tokens_RT, blank_RT, choice):
        pairs = [reading.details.positions[number] for number in choice.index_n.tolist()]
        self.passes.append(pairs)

        def logits(tokens_RT):
            rows = [tokens[:length].tolist() for tokens, length in zip(tokens_RT, reading.details.lengths, strict=True)]
            return self.predict(rows, pairs).float()

        logits_nV = logits(tokens_RT)
        if blank_RT is not None:
            blank_nV = logits(blank_RT)
            logits_nV = blank_nV + (self.guidance + 1) * (logits_nV - blank_nV)
        return choose(logits_nV, choice)

    def idle(self):
        self.idle_passes += 1
