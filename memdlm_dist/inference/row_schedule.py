"""Schedule of a row: its blocks, the number of tokens that a step keeps, and the positions that a pass reads.

This is the host's part of decoding. It counts positions and knows no tokens.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from memdlm_dist.inference.decoding import POST_STEPS, Decoding


class Outcome(NamedTuple):
    """Result of a row's step.

    Attributes:
        kept: number of open positions that were filled in.
        edited: number of decided tokens that were replaced.
        has_end: the response contains end-of-text; with `Decoding.leave_masks`, the present block does.
    """

    kept: int
    edited: int = 0
    has_end: bool = False


class RowSchedule:
    """Place of a row in its blocks.

    A block is the next `block_size` open positions; other tokens between them are not counted. With block-causal
    attention it is `block_size` positions, counted from the start of the row.

    Args:
        decoding: settings.
        length: number of tokens.
        open_positions: open positions, in order.

    Attributes:
        length: number of tokens.
        open: number of open positions of the present block.
    """

    def __init__(self, decoding: Decoding, length: int, open_positions: Sequence[int]):
        self._decoding, self.length = decoding, length
        self._blocks = self._divide(open_positions)  # the first is the present one
        self._changed: int | None = None  # first position whose cached keys and values are outdated; None: all are
        self._age: int | None = None  # steps since a pass read the whole row; None before the first one of a block
        self._is_first = True  # the present block is the row's first one
        self._enter()

    @property
    def is_finished(self) -> bool:
        """Return whether no block is left."""
        return not self._blocks

    @property
    def starts_later_block(self) -> bool:
        """Return whether the next step is the first one of a block other than the row's first."""
        return not (self._is_first or self._taken or self.is_finished)

    @property
    def block(self) -> list[int]:
        """Positions of the present block that were open at the start of decoding."""
        return self._blocks[0]

    @property
    def candidates(self) -> int:
        """Number of positions of the block for which a step needs predictions: open ones, or all with editing."""
        return self.open if self._decoding.edit_threshold is None else len(self.block)

    @property
    def quota(self) -> int:
        """Number of tokens that the next step keeps: exactly without a threshold, at least with one."""
        settings, size = self._decoding, self._decoding.block_size
        if settings.threshold is None:
            # More steps than open positions would predict from an unchanged row. The step keeps an equal share of the
            # remaining positions, rounded half to even as in LLaDA's published sampler.
            steps = min(settings.steps or size, len(self.block))
            return round(self.open / (steps - self._taken))
        if settings.steps is None:
            return settings.min_tokens
        # Shares of a whole block, also if a part of it is prompt, so that they always suffice.
        return size // settings.steps + (self._taken < size % settings.steps)

    @property
    def is_stale(self) -> bool:
        """Return whether the next pass must read the whole row."""
        if self._decoding.cache == "none":
            return True
        if self._age is None:
            return self._changed is None
        return 0 < self._decoding.cache_refresh <= self._age

    def cached_range(self, lookback: int) -> range:
        """Return the positions that a cached pass reads; for `lookback` see `Reader`."""
        first, last = self.block[0], self.block[-1]
        if self._is_block_causal:
            # All positions of the block, because they attend to each other; and first those that changed before it.
            first = self._block_start
            last = min(first + self._decoding.block_size, self.length) - 1
            if self._age is None and self._changed is not None:
                first = min(first, self._changed)
        elif self._decoding.cache == "prefix":
            last = self.length - 1
        return range(max(0, first - lookback), last + 1)

    def advance(self, outcome: Outcome, read_all: bool) -> bool:
        """Count a step, and leave the block if it is complete; return whether it is.

        Args:
            outcome: result of the step.
            read_all: the step's pass read the whole row.
        """
        was_decided = not self.open
        self.open -= outcome.kept
        self._taken += 1
        self._post_steps += was_decided
        self._age = 1 if read_all or self._age is None else self._age + 1
        if not self._is_complete(outcome, was_decided):
            return False
        if self._is_block_causal:
            self._changed = self._block_start
        self._blocks = self._blocks[1:]
        self._is_first = False
        self._enter()
        return True

    def drop_cache(self) -> None:
        """Read the whole row in the next pass: all cached keys and values are outdated."""
        self._changed = self._age = None

    def end(self) -> None:
        """Leave out the remaining blocks."""
        self._blocks = []

    @property
    def _is_block_causal(self) -> bool:
        return self._decoding.attention == "block_causal"

    @property
    def _block_start(self) -> int:
        """First position of the present block, with block-causal attention."""
        return self.block[0] // self._decoding.block_size * self._decoding.block_size

    @property
    def _last_post_step(self) -> int:
        return POST_STEPS if self._decoding.post_steps is None else self._decoding.post_steps

    def _divide(self, open_positions: Sequence[int]) -> list[list[int]]:
        """Divide open positions into blocks."""
        size = self._decoding.block_size
        if self._is_block_causal:
            return [[*block] for _, block in groupby(open_positions, lambda position: position // size)]
        return [[*open_positions[first : first + size]] for first in range(0, len(open_positions), size)]

    def _enter(self) -> None:
        """Start with the first of the blocks that are left."""
        self.open = len(self._blocks[0]) if self._blocks else 0
        self._taken = 0  # steps in this block
        self._post_steps = 0  # those that started without an open position
        self._age = None

    def _is_complete(self, outcome: Outcome, was_decided: bool) -> bool:
        """Return whether the present block is complete.

        Args:
            outcome: result of its last step.
            was_decided: the block had no open position at the start of that step.
        """
        settings = self._decoding
        if settings.leave_masks and outcome.has_end:
            return True
        if self.open or settings.edit_threshold is None:
            return not self.open
        return (was_decided and not outcome.edited) or self._post_steps == self._last_post_step
