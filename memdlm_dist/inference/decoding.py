"""Settings of decoding."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from memdlm_dist.errors import UserError

Remasking = Literal["low_confidence", "random"]
Cache = Literal["none", "prefix", "dual"]
DecodingAttention = Literal["full", "block_causal"]


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding.

    Attributes:
        block_size: open positions per block; blocks are decoded from left to right. With block-causal attention:
            positions per block.
        steps: steps per block; each step keeps a near-equal number of tokens. None: one token per step.
        temperature: factor of the Gumbel noise that is added to the logits; 0 is greedy.
        remasking: choice of the predictions that a step keeps: the most probable ("low_confidence") or random ones.
        stop_at_eos: end a row after the block in which its response contains end-of-text.
        seed: seed of temperature and random remasking.
        cfg_scale: scale s of classifier-free guidance as in LLaDA (arXiv 2502.09992). The logits are
            u + (s + 1) (c - u), where c reads the row, and u reads it with [MASK]s in place of the prompt's tokens.
            0: no guidance, and no second forward pass.
        suppress_tokens: ids of tokens that are never predicted.
        threshold: a step keeps all predictions with a confidence above this, and at least the most confident one
            (Fast-dLLM, arXiv 2505.22618). None: a fixed number of steps.
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
        if self.threshold is not None and self.steps is not None:
            raise UserError(
                f"A confidence threshold ({self.threshold}) and a number of steps per block ({self.steps}) exclude "
                "each other (the threshold decides how many tokens a step keeps); omit one of them."
            )
        if self.threshold is not None and self.remasking == "random":
            raise UserError(
                "A confidence threshold and random remasking exclude each other (random remasking has no confidences); "
                "omit one of them."
            )
        if self.cache_refresh < 0:
            raise UserError(f"The cache refresh must be a number of steps of at least 0, but is {self.cache_refresh}.")
        if self.cache_refresh and self.cache == "none":
            raise UserError(
                f"A cache refresh (every {self.cache_refresh} steps) needs a cache; choose the cache prefix or dual, "
                "or omit the refresh."
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
