"""Memory of the rows in a decoder's slots: a set of fast weights per slot, written when a row enters or starts a block.

Shapes: S slots.
"""

from collections.abc import Sequence

import torch

from memdlm_dist.errors import require
from memdlm_dist.inference.prompt_memory import AdaptedMemory, MemorySettings, PromptWriter
from memdlm_dist.inference.reader import ModelReader
from memdlm_dist.method import fast_weight_tree
from memdlm_dist.method.fast_weights import FastWeights


class SlotMemory:
    """Fast weights of the slots of a reader.

    Args:
        writer: runs the inner loop.
        reader: reads the fast weights.
        slots: S.
        memory: settings, with which each row's memory is written when it enters; or a memory that the rows read: that
            of one prompt, or a set for each slot.

    Attributes:
        seconds: time of the inner loops so far.
        steps: inner steps so far; a step serves all rows that are written together.

    Raises:
        UserError: if a given memory has another number of sets.
    """

    def __init__(self, writer: PromptWriter, reader: ModelReader, slots: int, memory: MemorySettings | AdaptedMemory):
        self._writer, self._reader, self._slots = writer, reader, slots
        self._settings = memory if isinstance(memory, MemorySettings) else memory.settings
        self._given: FastWeights | None = None  # one set per slot
        self._ids, self._rounds = [0] * slots, [0] * slots
        self.seconds, self.steps = 0.0, 0
        if isinstance(memory, AdaptedMemory):
            require(
                len(memory.prompts) in (1, slots),
                f"{slots} rows cannot read the memory of {len(memory.prompts)} prompts; give that of one prompt, or of "
                "as many prompts as rows.",
            )
            self._given = memory.fast
            if len(memory.prompts) != slots:
                self._given = fast_weight_tree.select(memory.fast, [0] * slots, 1)
            # A refresh replaces sets in place.
            reader.fast = fast_weight_tree.map_leaves(torch.clone, self._given) if self.refreshes else self._given

    @property
    def refreshes(self) -> bool:
        """Return whether the memory is to be written again before each block of a row but its first."""
        return self._settings.refresh == "block"

    def enter(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], ids: Sequence[int]) -> None:
        """Put rows into slots. If the memory is not given, adapt to their prompts; without rows, run the collectives.

        If it is given, the rows begin with it, also in slots whose sets a refresh has replaced.

        Args:
            slots: slots of the rows.
            prompts: token ids.
            ids: row ids, see `PromptWriter.write`.
        """
        for slot, row_id in zip(slots, ids, strict=True):
            self._ids[slot], self._rounds[slot] = row_id, 0
        if self._given is None:
            self._write(slots, prompts, is_refresh=False)
        elif self.refreshes and slots:
            assert self._reader.fast is not None
            given = fast_weight_tree.select(self._given, slots, self._slots)
            fast_weight_tree.replace_sets(self._reader.fast, slots, self._slots, given)

    def refresh(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Write the memory of some slots again, on longer texts; without slots, only run the collectives."""
        for slot in slots:
            self._rounds[slot] += 1
        self._write(slots, texts, is_refresh=True)

    def _write(self, slots: Sequence[int], texts: Sequence[Sequence[int]], is_refresh: bool) -> None:
        present = None
        if is_refresh and self._settings.start == "present":
            assert self._reader.fast is not None
            present = fast_weight_tree.select(self._reader.fast, slots or [0], self._slots)
        adapted = self._writer.write(
            texts or [[]],
            self._settings,
            [self._ids[slot] for slot in slots] or [0],
            [self._rounds[slot] for slot in slots] or [0],
            present,
        )
        self.seconds += adapted.seconds
        self.steps += adapted.steps
        if self._reader.fast is None:
            # Allocate one set per slot; the values are replaced below.
            self._reader.fast = fast_weight_tree.select(adapted.fast, [0] * self._slots, len(adapted.prompts))
        if slots:
            fast_weight_tree.replace_sets(self._reader.fast, slots, self._slots, adapted.fast)
