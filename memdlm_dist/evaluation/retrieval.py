"""Accuracy on needle tasks, memory off and on.

The accuracy of a small model stays low even if the model has learned part of the task. The answer NLL changes earlier:
the NLL of the true response with all of its tokens masked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from memdlm_dist.evaluation.needle import NeedleGenerator, Sample
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.predictor import Predictor
from memdlm_dist.inference.prompt_memory import MemorySettings
from memdlm_dist.method.fast_weights import FastWeights

MEMORY = {"off": False, "on": True}


@dataclass(frozen=True)
class Score:
    """Score on one task at one length with one memory setting, over `samples` questions."""

    task: str
    length: int
    memory: str  # name of the memory setting
    samples: int
    accuracy: float  # mean over the questions
    error: float  # standard error of the accuracy
    answer_nll: float  # nats per token of the true response, with all of its tokens masked; never with guidance
    memory_seconds: float  # of the slowest data-parallel rank, as below
    decoding_seconds: float
    memory_steps: int  # inner steps, summed over the batches of all ranks; a step serves all prompts of a batch
    passes: int  # forward passes of decoding, summed likewise


def evaluate(
    model: Predictor,
    needles: NeedleGenerator,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    memories: Mapping[str, MemorySettings | None],
    decoding: Decoding,
    new_tokens: int,
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
    warm_up: bool = False,
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Evaluate the same questions with each memory setting; a collective call.

    Args:
        model: the model to evaluate.
        needles: generator of the questions.
        tasks: keys of `TASKS`.
        lengths: tokens of prompt and response.
        samples: questions per task and length.
        memories: settings of the memory by name; None measures without memory.
        decoding: decoding settings.
        new_tokens: [MASK] positions per response.
        batch_size: questions per forward pass.
        progress: callback, called with the number of questions answered since its last call.
        warm_up: answer a batch with each memory setting first, so that no setting's time has the initialisation.

    Returns:
        The scores, and one record per question and memory setting: answers, response and accuracy.
    """
    scores: list[Score] = []
    records: list[dict[str, Any]] = []
    for task in tasks:
        for length in lengths:
            questions = [needles.sample(task, length, i) for i in range(samples)]
            if warm_up and not scores:
                for settings in memories.values():
                    evaluator = _Evaluator(model, decoding, new_tokens, settings)
                    first = questions[: batch_size * model.data_parallel.dp_size]
                    model.data_parallel.map_batches(first, batch_size, evaluator.answer)
            for memory, settings in memories.items():
                evaluator = _Evaluator(model, decoding, new_tokens, settings)
                answers = model.data_parallel.map_batches(questions, batch_size, evaluator.answer, progress)
                accuracies = [sample.accuracy(answer.text) for sample, answer in zip(questions, answers, strict=True)]
                error = stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
                nll = sum(answer.nll for answer in answers) / sum(answer.tokens for answer in answers)
                of_ranks = zip(*model.data_parallel.gather(evaluator.costs), strict=True)
                memory_seconds, decoding_seconds, memory_steps, passes = of_ranks
                scores.append(
                    Score(
                        task, length, memory, samples, mean(accuracies), error, nll,
                        max(memory_seconds), max(decoding_seconds), sum(memory_steps), sum(passes),
                    )
                )  # fmt: skip
                records += [
                    {"task": task, "length": length, "memory": memory, "sample": i, "answers": list(sample.answers),
                     "response": answer.text, "accuracy": accuracy}
                    for i, (sample, answer, accuracy) in enumerate(zip(questions, answers, accuracies, strict=True))
                ]  # fmt: skip
    return scores, records


class _Answer(NamedTuple):
    """Answer to one question."""

    text: str  # the model's response
    nll: float  # NLL of the true response, summed over its tokens, in nats
    tokens: int  # number of tokens of the true response


class _Evaluator:
    """Evaluator of questions with one memory setting, which also measures the time.

    Attributes:
        memory_seconds: time of adapting to the prompts, summed over the batches.
        decoding_seconds: time of decoding, summed over the batches.
        memory_steps: inner steps, summed over the batches.
        passes: forward passes of decoding, summed over the batches.
    """

    def __init__(self, model: Predictor, decoding: Decoding, new_tokens: int, memory: MemorySettings | None):
        self._model, self._decoding, self._new_tokens, self._memory = model, decoding, new_tokens, memory
        self.memory_seconds = self.decoding_seconds = 0.0
        self.memory_steps = self.passes = 0

    @property
    def costs(self) -> tuple[float, float, int, int]:
        """Return the seconds of memory and decoding, the inner steps and the passes of this rank."""
        return self.memory_seconds, self.decoding_seconds, self.memory_steps, self.passes

    def answer(self, batch: list[Sample], ids: list[int]) -> list[_Answer]:
        """Answer a batch of questions; `ids` are the keys of their random numbers."""
        encode, decode = self._model.tokenizer.encode_plain, self._model.tokenizer.decode
        prompts, truth = encode([sample.prompt for sample in batch]), encode([sample.response for sample in batch])
        generated = self._model.generate(prompts, self._new_tokens, self._decoding, self._memory, ids)
        self.memory_seconds += generated.memory_seconds
        self.decoding_seconds += generated.decoding_seconds
        self.memory_steps += generated.memory_steps
        self.passes += generated.passes
        nll = _answer_nll(self._model, prompts, truth, generated.fast)
        return list(map(_Answer, map(decode, generated.responses), nll, map(len, truth)))


def _answer_nll(
    model: Predictor, prompts: Sequence[list[int]], responses: Sequence[list[int]], fast: FastWeights | None
) -> list[float]:
    """Return the NLL of each true response with all of its tokens masked, summed over its tokens, in nats."""
    start = model.canvas(prompts, [len(response) for response in responses])
    clean_BL = start.tokens_BL.clone()
    clean_BL[start.response_BL] = torch.tensor([token for response in responses for token in response])
    return model.nll(start.tokens_BL, start.response_BL, clean_BL, start.attended_BL, fast).tolist()
