"""Results of a study: the losses and scores of all runs in one compact JSON file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from memdlm_dist.checkpoint.manager import MEMORY_OFF, MEMORY_ON
from memdlm_dist.errors import UserError, require
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.study import run_queue
from memdlm_dist.evaluation.study.arms import RESULT_FILES, TRAINING, Study
from memdlm_dist.evaluation.study.run_queue import Run
from memdlm_dist.training.validation_history import HISTORY_FILE, history

RESULTS = "study.json"
_DIGITS = 5


@dataclass(frozen=True)
class ArmResult:
    """Arm of a study file: label, the arm that it is compared with, overrides of the configuration."""

    label: str
    against: str
    overrides: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """Results of one run.

    Attributes:
        arm: name of the arm.
        seed: seed of the run.
        steps: steps of the validations.
        off: held-out loss with the memory off at these steps, in nats per token.
        on: the same with the memory on; empty for plain training.
        scores: evaluation -> rows (task, length, memory, questions, accuracy, answer NLL).
        exposure: evaluation -> rows (memory, mask ratio, tokens, static, sequential, same_positions).
        seconds: training and evaluations -> seconds.
    """

    arm: str
    seed: int
    steps: list[int]
    off: list[float]
    on: list[float]
    scores: dict[str, list[list[Any]]]
    exposure: dict[str, list[list[Any]]]
    seconds: dict[str, float]

    def with_evaluations(self, names: Sequence[str] | None) -> "RunResult":
        """Return the results with some of the evaluations; None: all."""
        if names is None:
            return self
        scores = {name: rows for name, rows in self.scores.items() if name in names}
        return replace(self, scores=scores, exposure={k: rows for k, rows in self.exposure.items() if k in names})


@dataclass(frozen=True)
class StudyResults:
    """Results of all runs of a study.

    Attributes:
        config: TOML file of the runs.
        arms: all arms of the study, in its order.
        runs: the runs.
        shown: names of the arms to show.
    """

    config: str
    arms: dict[str, ArmResult]
    runs: list[RunResult]
    shown: tuple[str, ...]

    def of(self, arm: str) -> dict[int, RunResult]:
        """Return the runs of an arm by seed."""
        return {run.seed: run for run in self.runs if run.arm == arm}

    def select(
        self,
        arms: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        against: str | None = None,
        evaluations: Sequence[str] | None = None,
    ) -> "StudyResults":
        """Return the results to show; the arms that others are compared with keep their runs.

        Args:
            arms: names of arms; None: all that have runs.
            seeds: seeds; None: all.
            against: arm that all others are compared with; None: as in the study.
            evaluations: names of evaluations; None: all.

        Raises:
            UserError: if an arm is unknown or has no run, or no run has an evaluation.
        """
        for name in [*(arms or []), *([against] if against else [])]:
            require(name in self.arms, f"There is no arm {name!r}; the results have {', '.join(self.arms)}.")
        runs = [run for run in self.runs if seeds is None or run.seed in seeds]
        present = {run.arm for run in runs}
        for name in arms or []:
            require(name in present, f"The arm {name} has no run with these seeds; leave out the arm or --seeds.")
        require(bool(runs), "There is no run with these seeds; leave out --seeds.")
        for name in evaluations or []:
            require(
                any(name in run.scores or name in run.exposure for run in runs),
                f"No run has the evaluation {name!r}; leave it out, or run it first.",
            )
        runs = [run.with_evaluations(evaluations) for run in runs]
        shown = tuple(name for name in self.arms if name in present and (arms is None or name in arms))
        table = {name: replace(arm, against=against or arm.against) for name, arm in self.arms.items()}
        return StudyResults(self.config, table, runs, shown)


def collect(study: Study, output: Path, path: Path, warn: Callable[[str], Any]) -> int:
    """Write the results of all runs in a folder; return their number.

    Args:
        study: the study.
        output: folder of the runs' folders.
        path: file to write.
        warn: callback, called with a sentence about each result that is left out.
    """
    runs = []
    for arm in study.arms:
        for folder in sorted(output.glob(f"{arm}-*"), key=lambda x: (len(x.name), x.name)):
            seed = folder.name.removeprefix(f"{arm}-")
            if not (seed.isdigit() and (folder / run_queue.DONE).exists()):
                continue
            try:
                runs.append(_collect_run(study, Run(arm, int(seed)), folder, warn))
            except UserError as error:
                warn(f"{folder} is left out: {error}")
    arms = {name: ArmResult(arm.label, arm.against, dict(arm.overrides)) for name, arm in study.arms.items()}
    lines = ",\n".join(json.dumps(asdict(run), separators=(",", ":")) for run in runs)
    head = json.dumps({"config": study.config, "arms": {name: asdict(arm) for name, arm in arms.items()}}, indent=1)
    report.write_text(path, f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n')  # a run per line, for readable differences
    return len(runs)


_EXPOSURE = ("static", "sequential", "same_positions")  # losses of a point, in the order of a row


def _collect_run(study: Study, run: Run, folder: Path, warn: Callable[[str], Any]) -> RunResult:
    finished = run_queue.done(folder)
    settings = run_queue.settings(study, run, [name for name in finished if name in study.evaluations])
    for name in [name for name in finished if finished[name]["setting"] != settings.get(name)]:
        warn(f"The {name} of {folder} is left out: the study file has other flags for it now.")
        del finished[name]
    rows = history(folder / HISTORY_FILE) if TRAINING in finished else []
    require(bool(rows), "it has no training with the flags of the study file, or no validation")
    scores: dict[str, list[list[Any]]] = {}
    exposure: dict[str, list[list[Any]]] = {}
    for name in finished:
        if name in study.evaluations:
            result = report.read_json(folder / name / RESULT_FILES[study.evaluations[name].tool])
            if "scores" in result:
                scores[name] = [
                    [x["task"], x["length"], x["memory"], x["samples"], _round(x["accuracy"]), _round(x["answer_nll"])]
                    for x in result["scores"]
                ]
            else:
                exposure[name] = [
                    [each["memory"], x["ratio"], x["tokens"], *(_round(x[key]) for key in _EXPOSURE)]
                    for each in result["results"]
                    for x in each["points"]
                ]
    return RunResult(
        run.arm, run.seed, [int(row["step"]) for row in rows], [_round(row[MEMORY_OFF]) for row in rows],
        [_round(row[MEMORY_ON]) for row in rows if MEMORY_ON in row], scores, exposure,
        {name: x["seconds"] for name, x in finished.items()},
    )  # fmt: skip


def _round(number: float) -> float:
    return round(number, _DIGITS)


def read(path: Path) -> StudyResults:
    """Read a file that `collect` has written.

    Raises:
        UserError: if the file is missing or malformed.
    """
    content = report.read_json(path)
    try:
        arms = {name: ArmResult(**arm) for name, arm in content["arms"].items()}
        runs = [RunResult(**run) for run in content["runs"]]
        return StudyResults(content["config"], arms, runs, tuple(arms))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a study's results ({error!r}); choose a study.json of tools/study.py."
        ) from None


def headline(folder: Path) -> str:
    """Return the last held-out losses of a run's folder as text."""
    rows = history(folder / HISTORY_FILE)
    if not rows:
        return "no validation"
    on = f", on {rows[-1][MEMORY_ON]:.4f}" if MEMORY_ON in rows[-1] else ""
    return f"held-out loss {rows[-1][MEMORY_OFF]:.4f}{on}"
