"""Reader for the sampler that answers from a function of the tokens instead of a backbone."""

from typing import NamedTuple

import torch

from memdlm_dist.inference.sampler import Decoder, Reading
from memdlm_dist.models.token_choice import choose


class Pass(NamedTuple):
    """Pass that the sampler asked for."""

    slots: list[int]
    read: list[range] | None  # positions that the pass reads of each row; None for all
    targets: list[tuple[int, int]]  # (row of the pass, position) pairs; decided ones pad the rows with few open


class _Details(NamedTuple):
    lengths: list[int]
    read: list[range] | None
    pairs: list[tuple[int, int]]  # (row, position) of each row of the head's input


class ToyReader:
    """Reader whose logits are a function of whole rows, also in a pass that reads only a part of them.

    Args:
        predict: (rows as lists of tokens without padding, (row, position) pairs) -> logits `[N, V]`.
        guidance: scale of classifier-free guidance.
        lookback: see `Reader`.

    Attributes:
        passes: passes so far.
        idle_passes: number of calls of `idle`.
    """

    device = torch.device("cpu")

    def __init__(self, predict, guidance=0.0, lookback=0):
        self.predict, self.guidance, self.lookback = predict, guidance, lookback
        self.passes, self.idle_passes = [], 0

    def plan(self, slots, lengths, targets, read):
        pairs = [(row, position) for row, block in enumerate(targets) for position in block]
        numbers = {pair: number for number, pair in enumerate(pairs)}
        longest = max(map(len, targets))
        row_RK = [[numbers.get((row, p), 0) for p in [*block, *[-1] * (longest - len(block))]]
                  for row, block in enumerate(targets)]  # fmt: skip
        details = _Details(list(lengths), read, pairs)
        return Reading(torch.tensor(slots), None, max(lengths), torch.tensor(row_RK), details)

    def choose(self, reading, tokens_RT, blank_RT, choice):
        lengths, read, pairs = reading.details
        targets = [pairs[number] for number in choice.index_n.tolist()]
        self.passes.append(Pass(reading.slot_R.tolist(), read, targets))

        def logits(x_RT):
            rows = [tokens[:length].tolist() for tokens, length in zip(x_RT, lengths, strict=True)]
            return self.predict(rows, targets)

        logits_nV = logits(tokens_RT)
        if blank_RT is not None:
            blank_nV = logits(blank_RT)
            logits_nV = blank_nV + (self.guidance + 1) * (logits_nV - blank_nV)
        return choose(logits_nV, choice)

    def idle(self):
        self.idle_passes += 1


class CachedToyReader(ToyReader):
    """Toy reader with block-causal attention and a cache: a pass renews the keys of the positions that it reads.

    The key of a position is a hash of the tokens up to the end of its block, and so are its logits of the keys.

    Args:
        table: logits `[E, V]`; a hash selects a row.
        block: tokens of a block.
        lookback: see `Reader`.
    """

    def __init__(self, table, block, lookback=0):
        super().__init__(None, lookback=lookback)
        self.table, self.block, self.keys = table, block, {}

    def end(self, position):
        """Return the end of a position's block."""
        return (position // self.block + 1) * self.block

    def new_keys(self, tokens, positions):
        """Return the keys of some positions of a row."""
        return {p: hash((p, *tokens[: self.end(p)])) for p in positions}

    def entry(self, keys, target):
        """Return the row of the table with the logits of a token."""
        source = target - self.lookback
        return hash((target, *(keys[p] for p in range(self.end(source)) if p in keys))) % len(self.table)

    def choose(self, reading, tokens_RT, blank_RT, choice):
        lengths, read, pairs = reading.details
        slots = reading.slot_R.tolist()
        for row, (slot, tokens, length) in enumerate(zip(slots, tokens_RT.tolist(), lengths, strict=True)):
            positions = range(length) if read is None else read[row]
            kept = {} if read is None else self.keys[slot]
            self.keys[slot] = kept | self.new_keys(tokens[:length], positions)
        targets = [pairs[number] for number in choice.index_n.tolist()]
        assert read is None or all(target - self.lookback in read[row] for row, target in targets)
        self.passes.append(Pass(slots, read, targets))
        entries = [self.entry(self.keys[slots[row]], target) for row, target in targets]
        return choose(self.table[entries], choice)


def toy_decoder(predict, decoding, start, mask_id, eos_id, slots=None, **options):
    """Return a decoder of a toy reader; it holds the canvas `start`, unless another number of slots is given."""
    rows, length = start.tokens_BL.shape
    reader = ToyReader(predict, decoding.cfg_scale, options.pop("lookback", 0))
    decoder = Decoder(reader, decoding, slots or rows, length, mask_id, eos_id, **options)
    if slots is None:
        decoder.load(range(rows), start)
    return decoder, reader
