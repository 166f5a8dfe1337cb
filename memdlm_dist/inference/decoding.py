"""Settings of decoding."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from memdlm_dist.errors import UserError

Remasking = Literal["low_confidence", "random"]
Cache = Literal["none", "prefix", "dual"]
DecodingAttention = Literal["full", "block_causal"]

POST_STEPS = 16  # as in the published settings of LLaDA2.1


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    Attributes:
        block_size: open positions per block; blocks are decoded from left to right. With block-causal attention:
            positions per block.
        steps: steps per block; each step keeps a near-equal number of tokens. None: one token per step. With a
            threshold, step k = 0, 1, ... of any block has the quota floor(block_size / steps), plus 1 if
            k < block_size mod steps.
        temperature: factor of the Gumbel noise that is added to the logits; 0 is greedy.
        remasking: choice of the predictions that a step keeps: the most probable ("low_confidence") or random ones.
        stop_at_eos: end a row after the block in which its response contains end-of-text.
        seed: seed of temperature and random remasking.
        cfg_scale: scale s of classifier-free guidance as in LLaDA (arXiv 2502.09992). The logits are
            u + (s + 1) (c - u), where c reads the row, and u reads it with [MASK]s in place of the prompt's tokens.
            0: no guidance, and no second forward pass.
        suppress_tokens: ids of tokens that are never predicted.
        threshold: a step keeps all predictions with a confidence above this, and at least as many of the most
            confident ones as its quota (Fast-dLLM, arXiv 2505.22618). None: a fixed number of steps.
        min_tokens: quota of every step with a threshold, unless `steps` is given.
        edit_threshold: a step also replaces decided tokens of the present block, except the prompt's, by the same
            pass's predictions with a confidence above this (LLaDA2.1, arXiv 2602.08676). None: decided tokens stay.
        post_steps: with editing, largest number of steps in a block after its last open position is filled in. The
            first of them that replaces nothing is the last one. None: `POST_STEPS`.
        leave_masks: end a block as soon as it contains end-of-text, also in the prompt's part, and leave its [MASK]s;
            decoding continues in the next block. Only for comparison with MemDLM's published sampler, which does so.
        cache: keys and values that a step takes from earlier passes. "prefix": those before the present block. "dual":
            those after it too. "none": every step reads whole rows.
        cache_refresh: steps of a block between two passes that read whole rows; 0: only the first step of a block.
        attention: "full": every token attends to its whole row, and cached keys and values are approximate.
            "block_causal": tokens attend to their own block and those before it; caches are then exact.
    """

    block_size: int = 32
    steps: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    stop_at_eos: bool = True
    seed: int = 0
    cfg_scale: float = 0.0
    suppress_tokens: tuple[int, ...] = ()
    threshold: float | None = None
    min_tokens: int = 1
    edit_threshold: float | None = None
    post_steps: int | None = None
    leave_masks: bool = False
    cache: Cache = "none"
    cache_refresh: int = 0
    attention: DecodingAttention = "full"

    def __post_init__(self) -> None:
        if self.block_size < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(f"block_size = {self.block_size} and steps = {self.steps} must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"The temperature must be a finite number of at least 0, but is {self.temperature}.")
        for name, kind in (("remasking", Remasking), ("cache", Cache), ("attention", DecodingAttention)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise UserError(f"{name} must be one of {', '.join(get_args(kind))}, not {value}.")
        if not 0 <= self.cfg_scale < math.inf:
            raise UserError(f"cfg_scale must be a finite number of at least 0, but is {self.cfg_scale}.")
        # The sentences also answer command-line flags, so they name the setting in words.
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"The confidence threshold must be a probability from 0 to 1, but is {self.threshold}.")
        if self.threshold is not None and self.remasking == "random":
            raise UserError(
                "A confidence threshold and random remasking exclude each other (random remasking has no confidences); "
                "omit one of them."
            )
        self._check_quota_and_editing()
        if self.cache_refresh < 0:
            raise UserError(f"The cache refresh must be a number of steps of at least 0, but is {self.cache_refresh}.")
        if self.cache_refresh and self.cache == "none":
            raise UserError(
                f"A cache refresh (every {self.cache_refresh} steps) needs a cache; choose the cache prefix or dual, "
                "or omit the refresh."
            )

    def _check_quota_and_editing(self) -> None:
        if self.min_tokens < 1:
            raise UserError(f"The number of tokens kept per step must be at least 1, but is {self.min_tokens}.")
        if self.min_tokens > 1 and self.threshold is None:
            raise UserError(
                f"A minimum of {self.min_tokens} tokens per step needs a confidence threshold (without one, the number "
                "of steps decides); give a threshold too, or omit the minimum."
            )
        if self.min_tokens > 1 and self.steps is not None:
            raise UserError(
                f"A minimum of {self.min_tokens} tokens per step and a number of steps per block ({self.steps}) "
                "exclude each other (both set the quota of a step); omit one of them."
            )
        if self.edit_threshold is not None and not 0 <= self.edit_threshold <= 1:
            raise UserError(
                f"The confidence threshold of editing must be a probability from 0 to 1, but is {self.edit_threshold}."
            )
        if self.edit_threshold is not None and self.threshold is None:
            raise UserError(
                f"Editing above a confidence ({self.edit_threshold}) needs a confidence threshold (a fixed number of "
                "steps has none); give a threshold too."
            )
        if self.post_steps is not None and self.edit_threshold is None:
            raise UserError(
                f"Steps after a complete block ({self.post_steps}) are for editing; give its confidence threshold too, "
                "or omit these steps."
            )
        if self.post_steps is not None and self.post_steps < 0:
            raise UserError(
                f"The steps of editing after a complete block must be at least 0, but are {self.post_steps}."
            )
        if self.leave_masks and (self.threshold is None or self.attention != "block_causal" or self.stop_at_eos):
            raise UserError(
                "leave_masks needs a threshold, attention = block_causal and stop_at_eos = False (the settings of the "
                "published sampler that it repeats); set these, or omit leave_masks."
            )

    def check_context_parallel(self, degree: int) -> None:
        """Check the cache against the number of context-parallel ranks.

        Raises:
            UserError: if there are several.
        """
        if self.cache != "none" and degree > 1:
            raise UserError(
                f"The cache {self.cache} does not work with parallelism.context_parallel_degree = {degree} (a block is "
                "too short to divide among ranks); choose the cache none, or a degree of 1."
            )

    def check_vocabulary(self, size: int) -> None:
        """Check the suppressed tokens against a vocabulary of `size` tokens.

        Raises:
            UserError: if a token is outside the vocabulary, or if no token but [MASK] is left.
        """
        for token_id in self.suppress_tokens:
            if not 0 <= token_id < size:
                raise UserError(
                    f"The suppressed token {token_id} is outside the model's vocabulary, 0 to {size - 1}; remove it."
                )
        if len(set(self.suppress_tokens)) >= size - 1:
            raise UserError("The suppressed tokens leave no token to predict; suppress fewer.")
