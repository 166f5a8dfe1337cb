"""Accuracy on needle tasks, memory off and on.

Small models answer wrongly long before they know nothing: beside the accuracy stands the NLL of the true response,
every token of it masked, which moves earlier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from memdlm_dist.evaluation.needle import NeedleGenerator, Sample
from memdlm_dist.inference.sampler import Decoding
from memdlm_dist.inference.trained_model import ANCHOR_RATIO, TrainedModel
from memdlm_dist.method.fast_weights import FastWeights

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
    needles: NeedleGenerator,
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
                evaluator = _Evaluator(model, decoding, new_tokens, MEMORY[memory], anchor_ratio)
                answers = model.data_parallel.map_batches(asked, batch_size, evaluator.answer, progress)
                right = [sample.accuracy(one.text) for sample, one in zip(asked, answers, strict=True)]
                error = stdev(right) / len(right) ** 0.5 if len(right) > 1 else 0.0
                nll = sum(one.nll for one in answers) / sum(one.tokens for one in answers)
                scores.append(
                    Score(
                        task, length, memory, samples, mean(right), error, nll, evaluator.memory_seconds,
                        evaluator.decoding_seconds,
                    )
                )  # fmt: skip
                records += [
                    {"task": task, "length": length, "memory": memory, "sample": i, "answers": list(sample.answers),
                     "response": one.text, "accuracy": accuracy}
                    for i, (sample, one, accuracy) in enumerate(zip(asked, answers, right, strict=True))
                ]  # fmt: skip
    return scores, records


class _Answer(NamedTuple):
    text: str
    nll: float  # of the true response, summed over its tokens
    tokens: int


class _Evaluator:
    """Asks with one memory setting, and adds up the time."""

    def __init__(self, model: TrainedModel, decoding: Decoding, new_tokens: int, memory: bool, anchor_ratio: float):
        self._model, self._decoding, self._new_tokens = model, decoding, new_tokens
        self._memory, self._anchor_ratio = memory, anchor_ratio
        self.memory_seconds = self.decoding_seconds = 0.0

    def answer(self, batch: list[Sample], ids: list[int]) -> list[_Answer]:
        encode, decode = self._model.tokenizer.encode_plain, self._model.tokenizer.decode
        prompts, truth = encode([sample.prompt for sample in batch]), encode([sample.response for sample in batch])
        made = self._model.generate(prompts, self._new_tokens, self._decoding, self._memory, self._anchor_ratio, ids)
        self.memory_seconds += made.memory_seconds
        self.decoding_seconds += made.decoding_seconds
        nll = _answer_nll(self._model, prompts, truth, made.fast)
        return list(map(_Answer, map(decode, made.responses), nll, map(len, truth)))


def _answer_nll(
    model: TrainedModel, prompts: Sequence[list[int]], responses: Sequence[list[int]], fast: FastWeights | None
) -> list[float]:
    """The sum of the NLL of each true response's tokens, all of them masked, in nats."""
    start = model.canvas(prompts, [len(response) for response in responses])
    clean_BL = start.tokens_BL.clone()
    clean_BL[start.response_BL] = torch.tensor([token for response in responses for token in response])
    return model.nll(start.tokens_BL, start.response_BL, clean_BL, start.attended_BL, fast).tolist()
