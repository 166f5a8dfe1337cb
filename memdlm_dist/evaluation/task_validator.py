"""Needle tasks during training: what the model answers with the memory off and on, in TensorBoard.

Tags, for each task and length: tasks/TASK_LENGTH/accuracy_memory_off (from 0 to 1) and answer_nll_memory_off (nats per
token), and the same with memory_on. tasks/seconds_memory_off and _on are the times of one validation.
"""

import copy
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import require
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import TASKS, NeedleGenerator, Sizes
from memdlm_dist.evaluation.retrieval import Score, evaluate
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.predictor import Predictor
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED
from memdlm_dist.runtime.rank_0 import is_rank_0
from memdlm_dist.training.objective import build_objective
from memdlm_dist.training.trainer import MemDLMTrainer

logger = logging.getLogger()

_BLOCK = 32  # tokens decoded per block


@dataclass(frozen=True)
class TaskSettings:
    """Settings of `validation.tasks`.

    Attributes:
        tasks: names of tasks.
        lengths: tokens of question and true answer.
        sizes: sizes of the tasks.
        samples: questions of each task at each length.
        new_tokens: tokens of each answer.
        interval: steps between two validations.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    sizes: Sizes
    samples: int
    new_tokens: int
    interval: int

    @classmethod
    def read(cls, config: JobConfig) -> "TaskSettings":
        """Read the section [validation].

        Raises:
            UserError: if a task, a length or a size is wrong, or the layout cannot answer tasks.
        """
        validation, seq_len = config.validation, config.training.seq_len
        for task in validation.tasks:
            require(
                task in TASKS, f"validation.tasks names {task!r}, which is no task; choose among {', '.join(TASKS)}."
            )
        longest = seq_len - validation.tasks_new_tokens
        require(
            longest >= 1,
            f"validation.tasks_new_tokens = {validation.tasks_new_tokens} leaves no room for questions in "
            f"training.seq_len = {seq_len}; lower it.",
        )
        lengths = validation.tasks_lengths or [longest]
        for length in lengths:
            require(
                1 <= length <= longest,
                f"validation.tasks_lengths has {length}, which is not from 1 to {longest} (training.seq_len less "
                "validation.tasks_new_tokens); correct it.",
            )
        named: dict[str, Sequence[Any]] = {"tasks": validation.tasks, "tasks_lengths": lengths}
        for key, values in named.items():
            twice = [value for value in values if values.count(value) > 1]
            require(not twice, f"validation.{key} has {''.join(map(str, twice[:1]))} twice; remove one.")
        parallel = config.parallelism
        require(
            parallel.context_parallel_degree == 1 or parallel.context_parallel_method != "ring",
            "validation.tasks pads prompts, which context_parallel_method = 'ring' cannot; choose 'ulysses', or remove "
            "the tasks.",
        )
        return cls(
            tuple(validation.tasks),
            tuple(lengths),
            read_sizes(validation.tasks_sizes),
            validation.tasks_samples,
            validation.tasks_new_tokens,
            validation.tasks_freq or validation.freq,
        )


class _Stopped(Exception):
    """End of a validation, after a stop request on any rank."""


class TaskValidator:
    """Held-out needle tasks of `validation.tasks`, with the same questions at every validation.

    The memory is written as at inference, on each question's prompt. It is left out if the run has none, or if expert
    parallelism leaves no fast weights per prompt.

    Args:
        trainer: the trainer whose model answers; its metrics receive the scores.
        settings: what to answer.

    Raises:
        UserError: if a length is too short for a task.
    """

    def __init__(self, trainer: MemDLMTrainer, settings: TaskSettings):
        config = trainer.job_config
        self._settings, self._last_step = settings, config.training.steps
        self._metrics, self._at, self._stop = trainer.metrics_processor, trainer.watchdog.at, trainer.stop
        with_memory = copy.deepcopy(config)
        with_memory.parametric_memory.enable = True
        objective = build_objective(with_memory, trainer.model_args, trainer.tokenizer.mask_id, trainer.parallel_dims)
        self._model = Predictor(
            trainer.model,
            trainer.model_args,
            trainer.tokenizer,
            objective,
            trainer.parallel_dims,
            trainer.device,
            trainer.maybe_enable_amp,
        )
        has_memory = config.parametric_memory.enable
        if has_memory and config.parallelism.expert_parallel_degree > 1:
            has_memory = False
            logger.warning(
                "validation.tasks are answered without memory, because expert parallelism leaves no fast weights per "
                "prompt."
            )
        self._memories = {"off": None, "on": AS_PUBLISHED} if has_memory else {"off": None}
        self._decoding = Decoding(min(_BLOCK, settings.new_tokens))
        self._batch_size = config.validation.local_batch_size or config.training.local_batch_size
        self._needles = NeedleGenerator(trainer.tokenizer, Haystack.read("heldout"), "heldout", settings.sizes, 0)
        for task in settings.tasks:
            for length in settings.lengths:
                for index in range(settings.samples):  # fails before the first step if a length is too short
                    self._needles.sample(task, length, index)

    def is_due(self, step: int) -> bool:
        """Return whether to validate after a step: every `validation.tasks_freq` steps, and after the last one."""
        return step % self._settings.interval == 0 or step == self._last_step

    def validate(self, step: int) -> list[Score]:
        """Answer the questions, log the scores and return them; a collective call.

        A stop request on any rank ends it after a batch, without scores.
        """
        settings, began = self._settings, time.perf_counter()

        def progress(count: int) -> None:
            self._at(f"answering validation.tasks at step {step}")
            stops = torch.tensor(float(self._stop.requested), device=self._model.device)
            dist.all_reduce(stops, dist.ReduceOp.MAX)
            if stops.item():
                raise _Stopped

        scores: list[Score] = []
        try:
            progress(0)
            # Prompts have many lengths: compiled blocks would be compiled again for them.
            with torch.compiler.set_stance("force_eager"):
                scores, _ = evaluate(
                    self._model,
                    self._needles,
                    settings.tasks,
                    settings.lengths,
                    settings.samples,
                    self._memories,
                    self._decoding,
                    settings.new_tokens,
                    self._batch_size,
                    progress,
                )
            self._metrics.log_scalars(scalars(scores), step)
            if is_rank_0():
                logger.info(f"tasks step: {step}  {summary(scores)}")
        except _Stopped:
            logger.info(f"The tasks of step {step} are left out, because a stop was requested.")
        self._metrics.exclude(time.perf_counter() - began)
        return scores


def summary(scores: Sequence[Score]) -> str:
    """Return accuracies in percent as a line, such as "repeat 128: off 3.1% on 6.2%"."""
    texts: dict[str, str] = {}
    for score in scores:
        place = f"{score.task} {score.length}:"
        texts[place] = f"{texts.get(place, place)} {score.memory} {score.accuracy:.1%}"
    return "  ".join(texts.values())


def scalars(scores: Sequence[Score]) -> dict[str, float]:
    """Return scores by TensorBoard tag."""
    values: dict[str, float] = {}
    for score in scores:
        place, memory = f"tasks/{score.task}_{score.length}", f"memory_{score.memory}"
        values[f"{place}/accuracy_{memory}"] = score.accuracy
        values[f"{place}/answer_nll_{memory}"] = score.answer_nll
        seconds = f"tasks/seconds_{memory}"
        values[seconds] = values.get(seconds, 0.0) + score.memory_seconds + score.decoding_seconds
    return values


def read_sizes(texts: Sequence[str]) -> Sizes:
    """Return the sizes of the tasks from texts NAME=N; those that are not named are RULER's.

    Raises:
        UserError: if a name is unknown or given twice, or a size is out of range.
    """
    known = {field.name for field in fields(Sizes)}
    given: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        require(
            name in known and re.fullmatch(r"[0-9]{1,9}", number) is not None,
            f"validation.tasks_sizes has {text!r}, which is not NAME=NUMBER; the names are {', '.join(sorted(known))}.",
        )
        require(name not in given, f"validation.tasks_sizes has {name} twice; remove one.")
        given[name] = int(number)
    return replace(Sizes(), **given)


def read_tasks(config: JobConfig) -> Callable[[MemDLMTrainer], TaskValidator | None]:
    """Read `validation.tasks`; return a function that builds their validator, or None if there are no tasks.

    Raises:
        UserError: as `TaskSettings.read` does.
    """
    if not (config.validation.enable and config.validation.tasks):
        return lambda trainer: None
    settings = TaskSettings.read(config)
    return lambda trainer: TaskValidator(trainer, settings)
