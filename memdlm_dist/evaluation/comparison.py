"""Comparison of needle evaluations and training runs over several seeds: tables, JSON and plots."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.retrieval import MEMORY, Score
from memdlm_dist.inference.predictor import MEMORY_WEIGHTS
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED
from memdlm_dist.training.validation_history import HISTORY_FILE, history
from memdlm_dist.training.validation_history import LOSSES as HELD_OUT

JSON, PNG, COMPARISON, LOSSES = "needle.json", "needle.png", "comparison", "losses"


def show(scores: Sequence[Score]) -> None:
    """Print accuracy, answer NLL and costs by task, length and memory, and what the memory adds to both.

    Args:
        scores: one for each task, length and memory setting, in the order of the rows.
    """
    rows = [
        [
            score.task,
            str(score.length),
            score.memory,
            f"{100 * score.accuracy:.1f} ± {100 * score.error:.1f}",
            f"{score.answer_nll:.3f}",
            f"{score.memory_seconds + score.decoding_seconds:.1f}",
            str(score.passes),
            str(score.memory_steps),
        ]
        for score in scores
    ]
    header = ["task", "length", "memory", "accuracy (%)", "answer NLL", "seconds", "passes", "inner steps"]
    print(report.table(header, rows))
    memories = dict.fromkeys(score.memory for score in scores)
    totals = {memory: _total([score for score in scores if score.memory == memory]) for memory in memories}
    for memory, total in totals.items():
        print(f"memory {memory}: {total.accuracy:.1f}% of {total.samples} questions in {total.seconds:.1f} s")
    if len(totals) == 2:
        off, on = totals["off"], totals["on"]
        print(
            f"the memory adds {on.accuracy - off.accuracy:+.1f} points of accuracy for "
            f"{on.seconds / max(off.seconds, 1e-9):.2f} times the time ({on.passes} passes and {on.steps} inner steps "
            f"in place of {off.passes} passes)"
        )


class _Total(NamedTuple):
    """Accuracy in percent over all questions, their number, and what they cost."""

    accuracy: float
    samples: int
    seconds: float
    passes: int
    steps: int


def _total(scores: Sequence[Score]) -> _Total:
    samples = sum(score.samples for score in scores)
    accuracy = 100 * sum(score.accuracy * score.samples for score in scores) / samples
    seconds = sum(score.memory_seconds + score.decoding_seconds for score in scores)
    passes, steps = (sum(getattr(score, name) for score in scores) for name in ("passes", "memory_steps"))
    return _Total(accuracy, samples, seconds, passes, steps)


Cells = dict[tuple[str, int], list[float]]  # (task, length) -> one value per run
# Measure, a field of `Score` -> table heading, factor.
MEASURES = {"accuracy": ("accuracy (%)", 100.0), "answer_nll": ("answer NLL (nats per token)", 1.0)}


def cells_of(results: Sequence[dict[str, Any]], memory: str, measure: str = "accuracy") -> Cells:
    """Collect one measure with one memory setting from the results of several runs.

    Args:
        results: contents of the runs' needle.json.
        memory: key of `MEMORY`.
        measure: key of `MEASURES`.
    """
    cells: Cells = {}
    for result in results:
        for score in result["scores"]:
            if score["memory"] == memory:
                value = MEASURES[measure][1] * score[measure]
                cells.setdefault((score["task"], score["length"]), []).append(value)
    return cells


def _std(values: Sequence[float]) -> float:
    """Return the standard deviation over runs; 0 for a single run."""
    return stdev(values) if len(values) > 1 else 0.0


def draw(arms: dict[str, Cells], path: Path) -> None:
    """Plot accuracy (%) against length, one panel per task; error bars are the standard deviation over seeds.

    Args:
        arms: name of each arm -> its accuracies.
        path: PNG file to write.
    """
    tasks = list(dict.fromkeys(task for cells in arms.values() for task, _ in cells))
    figure, axes = report.pyplot().subplots(1, len(tasks), figsize=(3 * len(tasks), 3.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, cells in arms.items():
            lengths = [length for cell_task, length in cells if cell_task == task]
            values = [cells[task, length] for length in lengths]
            axis.errorbar(lengths, list(map(mean, values)), list(map(_std, values)), marker="o", capsize=3, label=name)
        axis.set(title=task, xlabel="length (tokens)", ylim=(-3, 103))
    axes[0][0].set_ylabel("accuracy (%)")
    axes[0][-1].legend(fontsize=7)
    report.save(figure, path)


def named_folders(arms: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """Parse arguments NAME=DIR[,DIR] into names and folders.

    Raises:
        UserError: if an argument does not have that form.
    """
    named = []
    for text in arms:
        name, equals, folders = text.partition("=")
        if not equals or not folders:
            raise UserError(f"{text!r} names no results; write NAME=DIR, or NAME=DIR,DIR for several seeds.")
        named.append((name, [Path(folder) for folder in folders.split(",")]))
    return named


def compare_losses(arms: Sequence[str], output: Path, overwrite: bool) -> None:
    """Print, write and plot held-out losses by step and arm, mean and standard deviation over the runs of an arm.

    Args:
        arms: NAME=DIR[,DIR], with the output folders of training runs.
        output: folder for JSON and plot.
        overwrite: replace earlier results.

    Raises:
        UserError: if an argument is malformed or `output` cannot be used.
    """
    report.check_output(output, f"{LOSSES}.json", f"{LOSSES}.png", overwrite=overwrite)
    curves: dict[str, dict[int, list[float]]] = {}  # arm and memory setting -> step -> one loss per run
    for name, folders in named_folders(arms):
        for folder in folders:
            for row in history(folder / HISTORY_FILE):
                for key, label in zip(HELD_OUT, MEMORY, strict=True):
                    if key in row:
                        curves.setdefault(f"{name}, memory {label}", {}).setdefault(int(row["step"]), []).append(
                            row[key]
                        )
    steps = sorted({step for curve in curves.values() for step in curve})

    def cell(values: list[float]) -> str:
        return f"{mean(values):.4f} ± {_std(values):.4f}" if values else "-"

    rows = [[str(step), *(cell(curve.get(step, [])) for curve in curves.values())] for step in steps]
    print(report.table(["held-out loss at step", *curves], rows))
    report.write_json(output / f"{LOSSES}.json", curves)
    figure, axes = report.pyplot().subplots(1, len(MEMORY), figsize=(10, 3.6))
    for axis, memory in zip(axes, MEMORY, strict=True):
        for name, curve in curves.items():
            if name.endswith(f"memory {memory}"):
                means, stds = ([statistic(curve[step]) for step in sorted(curve)] for statistic in (mean, _std))
                axis.errorbar(sorted(curve), means, stds, marker=".", capsize=2, label=name.split(",")[0])
        axis.set(title=f"held-out loss, memory {memory}", xlabel="step", ylabel="nats per token")
        if axis.has_data():
            axis.legend(fontsize=8)
    report.save(figure, output / f"{LOSSES}.png")


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation's settings; those that results of earlier versions lack have their default."""
    decoding = {"cfg_scale": 0.0, "suppress_tokens": [], **result["settings"]["decoding"]}
    memory = {
        "memory_weights": MEMORY_WEIGHTS,
        "memory_chunk": AS_PUBLISHED.chunk,
        "memory_refresh": AS_PUBLISHED.refresh,
        "memory_from": AS_PUBLISHED.start,
    }
    return {**memory, **result["settings"], "decoding": decoding}


def compare_scores(arms: Sequence[str], output: Path, overwrite: bool) -> None:
    """Print, write and plot accuracy and answer NLL by arm, mean and standard deviation over the runs of an arm.

    Args:
        arms: NAME=DIR[,DIR], with the output folders of needle evaluations.
        output: folder for JSON and plot.
        overwrite: replace earlier results.

    Raises:
        UserError: if an argument is malformed, `output` cannot be used, or the evaluations have different settings.
    """
    report.check_output(output, f"{COMPARISON}.json", f"{COMPARISON}.png", overwrite=overwrite)
    by_arm: dict[str, dict[str, Cells]] = {}  # name -> measure -> cells
    settings: dict[str, Any] = {}
    for name, folders in named_folders(arms):
        results = [report.read_json(folder / JSON) for folder in folders]
        for folder, result in zip(folders, results, strict=True):
            if settings.setdefault("first", _settings(result)) != _settings(result):
                raise UserError(
                    f"The model of {folder} was asked different questions from the first; evaluate all with "
                    "the same settings."
                )
        for memory in MEMORY:
            if cells_of(results, memory):
                cells = {measure: cells_of(results, memory, measure) for measure in MEASURES}
                by_arm[f"{name}, memory {memory}"] = cells
    keys = list(dict.fromkeys(key for cells in by_arm.values() for key in cells["accuracy"]))
    for measure, (heading, _) in MEASURES.items():
        rows = []
        for name, cells in by_arm.items():
            columns = [cells[measure].get(key, []) for key in keys]
            averages = [mean(run) for run in zip(*filter(None, columns), strict=True)]
            digits = 1 if measure == "accuracy" else 3
            texts = [
                f"{mean(values):.{digits}f} ± {_std(values):.{digits}f}" if values else "-"
                for values in [*columns, averages]
            ]
            rows.append([f"{name} ({max(map(len, columns))})", *texts])
        print(report.table([heading, *(f"{task} {length}" for task, length in keys), "average"], rows) + "\n")
    report.write_json(
        output / f"{COMPARISON}.json",
        [{"arm": name, "measure": measure, "task": task, "length": length, "runs": values}
         for name, cells in by_arm.items() for measure in MEASURES
         for (task, length), values in cells[measure].items()],
    )  # fmt: skip
    draw({name: cells["accuracy"] for name, cells in by_arm.items()}, output / f"{COMPARISON}.png")
