"""Benchmark of decoding: caches and a confidence threshold against the plain loop, memory off and on.

The plain loop reads whole rows in every step and keeps one token per step. In each round every setting decodes the same
prompts once; ratios are computed within a round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch.distributed as dist

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data import corpus
from memdlm_dist.data.dataset import open_dataset
from memdlm_dist.data.row_shape import check_cards
from memdlm_dist.errors import UserError
from memdlm_dist.inference.decoding import Cache, Decoding
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method.fast_weights import FastWeights
from memdlm_dist.training.backbone import get_shard_requirements


@dataclass(frozen=True)
class Setting:
    """Setting of decoding that the bench compares.

    Attributes:
        cache: cache of keys and values.
        threshold: confidence threshold; None: one token per step.
        memory: decode with fast weights that were adapted to the prompts.
        cache_refresh: steps between two passes over whole rows; 0: only the first step of a block.
    """

    cache: Cache = "none"
    threshold: float | None = None
    memory: bool = False
    cache_refresh: int = 0

    @property
    def plain(self) -> "Setting":
        """Setting of the plain loop that this one is compared with."""
        return Setting(memory=self.memory)


@dataclass(frozen=True)
class _Decoded:
    """Responses to all prompts, with the time and the forward passes of the slowest rank."""

    responses: list[list[int]]
    seconds: float
    passes: int


def settings(caches: Sequence[Cache], threshold: float, memories: Sequence[bool]) -> list[Setting]:
    """Return all combinations of cache, threshold (none or `threshold`) and memory, plain loops included.

    Raises:
        UserError: if the threshold is not a probability.
    """
    Decoding(threshold=threshold)  # raises a UserError if it is no probability
    every: list[Cache] = ["none", *(cache for cache in dict.fromkeys(caches) if cache != "none")]
    return [Setting(cache, t, memory) for memory, cache, t in product(memories, every, (None, threshold))]


def prompts(config: JobConfig, model: TrainedModel, count: int, length: int) -> list[list[int]]:
    """Return `count` prompts of `length` tokens, cut one after the other from real text.

    The text is that of data.validation, or the Python standard library's source files if data.validation is empty.

    Raises:
        UserError: if the shards do not fit the run, or the text is too short.
    """
    need = count * length
    text: list[int] = []
    if locations := list(config.data.validation):
        check_cards(locations, get_shard_requirements(config, model.mask_id))
        dataset = open_dataset(config.data, locations, [], batch_size=1, shuffle=False)
        for number in range(dataset.size):
            if len(text) >= need:
                break
            # End-of-text also pads rows.
            text += [token for token in dataset[number]["tokens"].tolist() if token != model.eos_id]
    else:
        for source in corpus.builtin_sources():
            if len(text) >= need:
                break
            for row in corpus.builtin_rows(source):
                text += model.tokenizer.encode_text([row.values["text"]])[0] if row.problem is None else []
    if len(text) < need:
        origin = ", ".join(locations) or "the standard library"
        raise UserError(
            f"{count} prompts of {length} tokens need {need} tokens of text, but {origin} has {len(text)}; lower "
            "--prompt-tokens or --batch-size."
        )
    return [text[start : start + length] for start in range(0, need, length)]


def measure(
    model: TrainedModel,
    rows: Sequence[list[int]],
    chosen: Sequence[Setting],
    *,
    new_tokens: int,
    block_size: int,
    rounds: int,
    memory: MemorySettings = AS_PUBLISHED,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Decode the prompts with every setting in each round, in turn; return the numbers of the report.

    All ranks must call this. Data-parallel ranks have equal shares of the prompts. Every setting first decodes one
    block, which is not measured.

    Args:
        model: the model.
        rows: prompts, as many on each data-parallel rank.
        chosen: settings, with the plain one of each memory setting.
        new_tokens: tokens to decode per prompt.
        block_size: tokens per block.
        rounds: measured rounds.
        memory: settings of the memory.
        progress: callback with a line of text at the start of a round.
    """
    share = len(rows) // model.data_parallel.dp_size
    first = model.data_parallel.dp_rank * share
    adapted = None
    if any(setting.memory for setting in chosen):
        adapted = model.adapt(rows[first : first + share], memory, range(first, first + share))

    def decode(setting: Setting, tokens: int) -> _Decoded:
        fast = adapted.fast if setting.memory and adapted is not None else None
        return _decode(model, rows, share, setting, tokens, block_size, fast)

    for setting in chosen:
        decode(setting, min(block_size, new_tokens))
    decoded: dict[Setting, list[_Decoded]] = {setting: [] for setting in chosen}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        # Another order in each round, so that no setting always follows the same one.
        turn = number % len(chosen)
        for setting in [*chosen[turn:], *chosen[:turn]]:
            decoded[setting].append(decode(setting, new_tokens))
    results = []
    for setting, of_rounds in decoded.items():
        plain = decoded[setting.plain]
        results.append(
            {
                "memory": "on" if setting.memory else "off",
                "cache": setting.cache,
                "threshold": setting.threshold,
                "seconds": statistics.median(x.seconds for x in of_rounds),
                "seconds_range": [min(x.seconds for x in of_rounds), max(x.seconds for x in of_rounds)],
                "tokens_per_second": len(rows) * new_tokens / statistics.median(x.seconds for x in of_rounds),
                "over_plain": statistics.median(
                    p.seconds / x.seconds for p, x in zip(plain, of_rounds, strict=True)
                ),
                "passes": of_rounds[0].passes,
                "agreement": _agreement(of_rounds[0].responses, plain[0].responses),
            }
        )  # fmt: skip
    return {
        "prompts": len(rows),
        "prompt_tokens": len(rows[0]),
        "new_tokens": new_tokens,
        "block_size": block_size,
        "rounds": rounds,
        "memory_seconds": adapted.seconds if adapted is not None else None,
        "settings": results,
    }


def _decode(
    model: TrainedModel,
    rows: Sequence[list[int]],
    share: int,
    setting: Setting,
    new_tokens: int,
    block_size: int,
    fast: FastWeights | None,
) -> _Decoded:
    """Decode all prompts, each data-parallel rank its share."""
    # End-of-text does not end a row, so that every setting decodes the same number of tokens.
    decoding = Decoding(
        block_size=block_size,
        stop_at_eos=False,
        threshold=setting.threshold,
        cache=setting.cache,
        cache_refresh=setting.cache_refresh,
    )

    def work(batch: list[list[int]], ids: list[int]) -> list[tuple[list[int], int]]:
        start = model.canvas(batch, new_tokens, ids)
        decoder = model.decoder(start, decoding, fast)
        decoder.run()
        tokens = decoder.tokens(range(len(batch)))
        return [(row[len(prompt) :], decoder.passes) for row, prompt in zip(tokens, batch, strict=True)]

    dist.barrier()
    began = time.perf_counter()
    results = model.data_parallel.map_batches(rows, share, work)
    dist.barrier()
    seconds = time.perf_counter() - began
    return _Decoded([response for response, _ in results], seconds, max(passes for _, passes in results))


def _agreement(responses: Sequence[list[int]], plain: Sequence[list[int]]) -> float:
    """Return the share of positions with equal tokens."""
    equal = [a == b for x, y in zip(responses, plain, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(equal) / len(equal)


def table(result: dict[str, Any]) -> str:
    """Format the results of `measure` as a table."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "memory": lambda x: str(x["memory"]),
        "cache": lambda x: str(x["cache"]),
        "threshold": lambda x: "none" if x["threshold"] is None else f"{x['threshold']:g}",
        "tokens/s": lambda x: f"{x['tokens_per_second']:,.1f}",
        "times plain": lambda x: f"{x['over_plain']:.2f}",
        "passes": lambda x: str(x["passes"]),
        "agreement": lambda x: f"{100 * x['agreement']:.1f}%",
    }
    lines = ["".join(f"{name:>13}" for name in columns)]
    lines += ["".join(f"{value(x):>13}" for value in columns.values()) for x in result["settings"]]
    lines.append(
        f"{result['prompts']} prompts of {result['prompt_tokens']} tokens, {result['new_tokens']} new tokens each in "
        f"blocks of {result['block_size']}; medians of {result['rounds']} rounds"
    )
    if result["memory_seconds"] is not None:
        lines.append(f"writing the prompts into memory, not counted above: {result['memory_seconds']:.2f} s")
    lines.append(
        "agreement: share of tokens equal to those of the plain loop with the same memory setting. With random weights "
        "it says little about trained ones."
    )
    return "\n".join(lines)
