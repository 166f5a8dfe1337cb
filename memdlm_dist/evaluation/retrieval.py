"""Accuracy on needle tasks, memory off and on.

Small models answer wrongly long before they know nothing: beside the accuracy stands the NLL of the true response,
every token of it masked, which moves earlier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memdlm_dist.evaluation.needle import Needles, Sample
from memdlm_dist.fast_weights import FastWeights
from memdlm_dist.inference import ANCHOR_RATIO, TrainedModel
from memdlm_dist.sampler import Decoding

MEMORY = {"off": False, "on": True}


@dataclass(frozen=True)
class Score:
    """The accuracy on one task at one length with the memory off or on, over `samples` questions."""

    task: str
    length: int
    memory: str
    samples: int
    accuracy: float
    error: float  # standard error over the questions
    answer_nll: float  # nats per token of the true response while all of it is masked
    memory_seconds: float
    decoding_seconds: float


def evaluate(
    model: TrainedModel,
    needles: Needles,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    memories: Sequence[str],
    decoding: Decoding,
    new_tokens: int,
    batch_size: int,
    anchor_ratio: float = ANCHOR_RATIO,
    progress: Callable[[int], Any] = lambda count: None,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Ask the same questions with every memory setting.

    Args:
        samples: questions of each task at each length.
        memories: keys of `MEMORY`.
        new_tokens: [MASK] positions for a response.
        progress: told how many more questions are answered.

    Returns:
        The scores, and every question with its answers, response and accuracy.
    """
    scores, records = [], []
    for task in tasks:
        for length in lengths:
            asked = [needles.sample(task, length, i) for i in range(samples)]
            for memory in memories:
                seconds = [0.0, 0.0]

                def answer(
                    batch: list[Sample], ids: list[int], memory: str = memory, seconds: list[float] = seconds
                ) -> list[tuple[str, float, int]]:
                    prompts = model.tokenizer.encode_plain([sample.prompt for sample in batch])
                    made = model.generate(prompts, new_tokens, decoding, MEMORY[memory], anchor_ratio, ids)
                    seconds[0] += made.memory_seconds
                    seconds[1] += made.decoding_seconds
                    truth = model.tokenizer.encode_plain([sample.response for sample in batch])
                    texts = [model.tokenizer.decode(response) for response in made.responses]
                    nll = _answer_nll(model, prompts, truth, made.fast)
                    return list(zip(texts, nll, map(len, truth), strict=True))

                found = model.spread(asked, batch_size, answer, progress)
                responses = [text for text, _, _ in found]
                right = [sample.accuracy(text) for sample, text in zip(asked, responses, strict=True)]
                nll = sum(one for _, one, _ in found) / sum(tokens for _, _, tokens in found)
                scores.append(Score(task, length, memory, samples, *mean_and_error(right), nll, *seconds))
                records += [
                    {"task": task, "length": length, "memory": memory, "sample": i, "answers": list(sample.answers),
                     "response": text, "accuracy": accuracy}
                    for i, (sample, text, accuracy) in enumerate(zip(asked, responses, right, strict=True))
                ]  # fmt: skip
    return scores, records


def _answer_nll(
    model: TrainedModel,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    fast: FastWeights | None,
) -> list[float]:
    """The sum of the NLL of each true response's tokens, all of them masked, in nats."""
    start = model.canvas(prompts, [len(response) for response in responses])
    clean_BL = start.tokens_BL.clone()
    clean_BL[start.response_BL] = torch.tensor([token for response in responses for token in response])
    return model.nll(start.tokens_BL, start.response_BL, clean_BL, start.attended_BL, fast).tolist()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, (variance / len(values)) ** 0.5
