"""Memory of prompts: the inner loop on whole prompts, on pieces of long ones, or again on longer texts.

MemDLM adapts once, on the whole prompt. Pieces, and the refresh before each block of the response, are additions of
this project.

Shapes: B prompts, each with one set of fast weights; L tokens.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from memdlm_dist.errors import UserError
from memdlm_dist.inference.canvas import Canvas
from memdlm_dist.inference.reader import SequenceShards
from memdlm_dist.method import bilevel, fast_weight_tree, trajectory
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.method.inner_loop import InnerStatistics
from memdlm_dist.method.micro_batch import micro_batch
from memdlm_dist.models.llada import LLaDA
from memdlm_dist.training.objective import Objective

ANCHOR_RATIO = 0.2
Refresh = Literal["none", "block"]
Start = Literal["fresh", "present"]

# Upper limit of the pieces of a text: the masks of piece p of a row's n-th writing are keyed by n times this plus p.
_MAX_PIECES = 2**20


@dataclass(frozen=True)
class MemorySettings:
    """Settings of the memory of a prompt.

    Attributes:
        anchor_ratio: share of the tokens that the anchor masks.
        chunk: largest number of tokens that the inner loop reads at once. Longer texts are divided into pieces of
            nearly equal length, and the inner loop reads one after another. None: it reads whole texts.
        refresh: "block": before each block of the response but the first, the inner loop runs again, on the prompt and
            the tokens before the block. "none": only once, on the prompt.
        start: with a refresh, the fast weights it starts with: "fresh", as for the prompt, or "present".
    """

    anchor_ratio: float = ANCHOR_RATIO
    chunk: int | None = None
    refresh: Refresh = "none"
    start: Start = "fresh"

    def __post_init__(self) -> None:
        # The sentences also answer command-line flags, so they name the setting in words.
        if not 0 < self.anchor_ratio <= 1:
            raise UserError(f"The anchor ratio must be above 0 and at most 1, but is {self.anchor_ratio}.")
        if self.chunk is not None and self.chunk < 2:
            raise UserError(f"The memory's pieces must have at least 2 tokens, but have {self.chunk}.")
        for name, value, kind in (("refresh", self.refresh, Refresh), ("start", self.start, Start)):
            if value not in get_args(kind):
                raise UserError(f"The memory's {name} must be one of {', '.join(get_args(kind))}, not {value}.")
        if self.start == "present" and self.refresh == "none":
            raise UserError(
                "Starting from the present fast weights needs a refresh (without one, the memory is written once); "
                "refresh the memory before each block, or start fresh."
            )

    def check_refresh_keeps_loaded(self) -> None:
        """Check that a refresh keeps a memory that was loaded.

        Raises:
            UserError: if it would start with fresh fast weights.
        """
        if self.refresh != "none" and self.start == "fresh":
            raise UserError(
                "A refresh from fresh fast weights would drop the loaded memory; start from the present fast weights "
                "(--memory-from present), or omit the refresh (--memory-refresh)."
            )


AS_PUBLISHED = MemorySettings()


@dataclass(frozen=True)
class PromptIdentity:
    """Number of a prompt's tokens, and the SHA-256 of their ids as little-endian int64."""

    tokens: int
    sha256: str


def identify(prompt: Sequence[int]) -> PromptIdentity:
    """Return the identity of a prompt, given as token ids."""
    content = np.asarray(prompt, dtype="<i8").tobytes()
    return PromptIdentity(len(prompt), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class AdaptedMemory:
    """Fast weights adapted to prompts, and what that took.

    Attributes:
        fast: one set per prompt.
        settings: settings with which they were adapted, and will be refreshed.
        prompts: identities of the prompts.
        seconds: time of adapting.
        steps: inner steps on each prompt; a step is a forward and a backward pass through the adapted layers.
    """

    fast: FastWeights
    settings: MemorySettings
    prompts: tuple[PromptIdentity, ...]
    seconds: float
    steps: int


class PromptWriter:
    """Inner loop on prompts. Call it on all ranks.

    Args:
        model: the backbone.
        objective: objective whose memory has one set per sample.
        canvas: builds the canvas of texts and row ids.
        mask_id: token id of [MASK].
        shards: division of the rows among ranks.
        device: device of the model.
        autocast: context of the passes.
        maximum: maximum of a number over the data-parallel ranks.
    """

    def __init__(
        self,
        model: LLaDA,
        objective: Objective,
        canvas: Callable[[Sequence[Sequence[int]], Sequence[int] | None], Canvas],
        mask_id: int,
        shards: SequenceShards,
        device: torch.device,
        autocast: AbstractContextManager[Any],
        maximum: Callable[[int], int],
    ):
        assert objective.memory is not None
        self._model, self._objective, self._memory, self._canvas = model, objective, objective.memory, canvas
        self._mask_id, self._shards, self._device = mask_id, shards, device
        self._autocast, self._maximum = autocast, maximum

    def write(
        self,
        texts: Sequence[Sequence[int]],
        settings: MemorySettings = AS_PUBLISHED,
        ids: Sequence[int] | None = None,
        rounds: Sequence[int] | None = None,
        fast: FastWeights | None = None,
    ) -> AdaptedMemory:
        """Adapt fast weights to texts, one set per text; the result for a text does not depend on the others.

        [MASK]s in a text are not scored. An empty text leaves its fast weights as they are.

        Args:
            texts: token ids, at least one text on each rank.
            ids: row ids, which key the masks and the initial fast weights; 0, 1, ... if None.
            rounds: number of earlier writings of each row, which key the masks; 0 if None.
            fast: fast weights to start with; newly drawn ones if None.

        Raises:
            UserError: with expert parallelism, which has no fast weights per prompt.
        """
        if self._memory.ep_mesh is not None:
            raise UserError(
                "This model was loaded without memory (its expert parallelism has no fast weights per prompt); load it "
                "with memory, or set parallelism.expert_parallel_degree to 1."
            )
        began = time.perf_counter()
        ids_B = torch.tensor(range(len(texts)) if ids is None else ids, dtype=torch.int64)
        rounds_B = torch.zeros_like(ids_B) if rounds is None else torch.tensor(rounds)
        by_text = [pieces(text, settings.chunk) for text in texts]
        count = max(map(len, by_text))
        if settings.chunk is not None:
            count = self._maximum(count)
        taken: list[InnerStatistics] = []
        # Every text has a first piece, so after it `fast` is this call's own copy.
        for number in range(count):
            # Rows that have no piece left keep their fast weights. A rank without any only runs the collectives.
            rows = [row for row, of_row in enumerate(by_text) if number < len(of_row)]
            step_B = rounds_B * _MAX_PIECES + number
            if len(rows) == len(texts):
                fast, statistics = self._adapt([of_row[number] for of_row in by_text], settings, ids_B, step_B, fast)
            else:
                assert fast is not None
                chosen = rows or [0]
                read = [by_text[row][number] if rows else [] for row in chosen]
                part = fast_weight_tree.select(fast, chosen, len(texts))
                part, statistics = self._adapt(read, settings, ids_B[chosen], step_B[chosen], part)
                if rows:
                    fast_weight_tree.replace_sets(fast, rows, len(texts), part)
            taken.append(statistics)
        assert fast is not None
        taken[-1].written_norm_G.sum().item()  # waits for the device
        steps = sum(len(statistics.loss_KG) for statistics in taken)
        return AdaptedMemory(fast, settings, tuple(map(identify, texts)), time.perf_counter() - began, steps)

    def _adapt(
        self,
        texts: Sequence[Sequence[int]],
        settings: MemorySettings,
        ids_B: Tensor,
        step_B: Tensor,
        fast: FastWeights | None,
    ) -> tuple[FastWeights, InnerStatistics]:
        """Run the inner loop on one piece of each text."""
        objective, shards = self._objective, self._shards
        start = self._canvas(texts, ids_B.tolist())
        maskable_BL = start.attended_BL & ~start.open_BL
        if objective.shifted:
            maskable_BL[:, 0] = False
        levels_B = torch.full(ids_B.shape, settings.anchor_ratio, dtype=torch.float64)
        draw = trajectory.draw(objective.seed, step_B, ids_B, maskable_BL, levels_B)
        anchor = trajectory.prompt_anchor(draw, settings.anchor_ratio)
        batch = micro_batch(
            start.tokens_BL,
            maskable_BL,
            ids_B,
            anchor,
            objective.plan.states(draw, anchor),
            self._mask_id,
            with_teacher=self._memory.loss.teacher is not None,
            sequence_shards=shards.count,
            shifted=objective.shifted,
        )._replace(attended_BL=start.attended_BL)
        batch = batch.cp_slice(shards.cp_rank, shards.cp_size).to(self._device)
        self._model.extend_rope(start.tokens_BL.shape[1])
        if fast is None:
            fast = self._memory.draw(objective.seed, 0, batch.sample_ids_U)
        with self._autocast:
            return bilevel.adapt_fast_weights(self._model, batch, self._memory, fast, objective.tp_rank)


def pieces(text: Sequence[int], chunk: int | None) -> list[Sequence[int]]:
    """Divide a text into as few pieces of at most `chunk` tokens as possible, of nearly equal length."""
    count = 1 if chunk is None else max(1, -(-len(text) // chunk))
    return [text[len(text) * i // count : len(text) * (i + 1) // count] for i in range(count)]
