"""Tables and plots of a study: values by arm, and differences paired by seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.retrieval import MEMORY
from memdlm_dist.evaluation.study.paired import difference, first_step_below
from memdlm_dist.evaluation.study.study_results import RunResult, StudyResults

# Columns of a run's rows, see `RunResult`.
_LENGTH, _MEMORY, _ACCURACY, _NLL = 1, 2, 4, 5
_STYLES = {"off": "-", "on": "--"}  # line styles of the memory settings in every plot
_LINEAR = 0.02  # differences up to this are drawn on a linear scale, larger ones on a logarithmic one

Values = dict[int, float]  # seed -> value


def tables(study: StudyResults, confidence: float) -> str:
    """Return the Markdown tables of the losses, of every needle evaluation and of the exposure bias.

    A cell has the mean and the standard deviation over the seeds.

    Args:
        study: results to show.
        confidence: confidence of the intervals of paired differences.
    """
    parts = [f"Intervals have a confidence of {confidence:.2%}.", _loss_table(study, confidence)]
    for name in _evaluations(study, "scores"):
        parts += [f"Needle evaluation {name}:"]
        parts += [_score_table(study, name, column, confidence) for column in (_ACCURACY, _NLL)]
    for name in _evaluations(study, "exposure"):
        parts += [f"Exposure bias, {name}:", _exposure_table(study, name)]
    return "\n\n".join(parts)


def _loss_table(study: StudyResults, confidence: float) -> str:
    rows = []
    for arm in study.shown:
        runs, others = study.of(arm), study.of(study.arms[arm].against)
        off, on = _each(runs, _last_off), _each(runs, lambda run: run.on[-1] if run.on else None)
        is_reference = study.arms[arm].against == arm
        reached = [
            first_step_below(run.steps, run.off, others[seed].off[-1]) for seed, run in runs.items() if seed in others
        ]
        steps = [step for step in reached if step is not None]
        step_text = f"{mean(steps):.0f}" if steps else "never" if reached else ""
        if steps and len(steps) < len(reached):
            step_text += f" ({len(steps)} of {len(reached)} runs)"
        rows.append([
            arm, str(len(runs)), _cell(off, 4),
            *(["", ""] if is_reference else [study.arms[arm].against, _compared(study, arm, _last_off, confidence, 4)]),
            _cell(on, 4), step_text, _cell(_each(runs, lambda run: run.seconds.get("training")), 0),
        ])  # fmt: skip
    header = ["arm", "seeds", "loss, memory off", "compared with", "difference", "loss, memory on",
              "steps to its loss", "training (s)"]  # fmt: skip
    return report.markdown(header, rows)


def _last_off(run: RunResult) -> float:
    return run.off[-1]


def _score_table(study: StudyResults, name: str, column: int, confidence: float) -> str:
    """Return accuracies in percent, or answer NLLs, by arm and length, averaged over the tasks.

    Args:
        study: results to show.
        name: the evaluation.
        column: `_ACCURACY` or `_NLL`.
        confidence: confidence of the intervals.
    """
    digits = 1 if column == _ACCURACY else 3
    rows = []
    for arm in study.shown:
        runs = [run for run in study.of(arm).values() if name in run.scores]
        lengths = sorted({row[_LENGTH] for run in runs for row in run.scores[name]})
        for length in [*lengths, *([None] if len(lengths) > 1 else [])]:
            row = [arm, "all" if length is None else str(length)]
            by_memory = {memory: _score(name, length, memory, column) for memory in MEMORY}
            for value in by_memory.values():
                row += [_cell(_each(study.of(arm), value), digits), _compared(study, arm, value, confidence, digits)]
            off, on = (_each(study.of(arm), value) for value in by_memory.values())
            gain = difference(on, off, confidence)
            rows.append([*row, "" if gain is None else gain.text(digits)])
    measure = "accuracy (%)" if column == _ACCURACY else "answer NLL"
    header = [measure, "length"]
    for memory in MEMORY:
        header += [f"memory {memory}", "difference"]
    return report.markdown([*header, "on minus off"], rows)


def _score(name: str, length: int | None, memory: str, column: int) -> Callable[[RunResult], float | None]:
    """Return a function that averages a column of a run's scores over the tasks; accuracies in percent.

    Args:
        name: the evaluation.
        length: the length; None: all.
        memory: the memory setting.
        column: `_ACCURACY` or `_NLL`.
    """

    def value(run: RunResult) -> float | None:
        values = [
            row[column]
            for row in run.scores.get(name, [])
            if row[_MEMORY] == memory and (length is None or row[_LENGTH] == length)
        ]
        return mean(values) * (100 if column == _ACCURACY else 1) if values else None

    return value


def _exposure_table(study: StudyResults, name: str) -> str:
    """Return R_EB, and its part at the same positions, by arm, memory setting and mask ratio."""
    ratios = sorted(
        {row[1] for arm in study.shown for run in study.of(arm).values() for row in run.exposure.get(name, [])}
    )
    rows = []
    for arm in study.shown:
        for memory in MEMORY:
            cells = [
                _cell(_each(study.of(arm), _exposure(name, memory, ratio, below)), 3)
                for below in ("static", "same positions")
                for ratio in ratios
            ]
            if any(cells):
                rows.append([arm, memory, *cells])
    header = [
        "arm",
        "memory",
        *(f"R_EB at {ratio}" for ratio in ratios),
        *(f"same positions, {ratio}" for ratio in ratios),
    ]
    return report.markdown(header, rows)


def _exposure(name: str, memory: str, ratio: float, below: str) -> Callable[[RunResult], float | None]:
    """Return a function that divides a run's sequential loss by its static one, or by that at the same positions."""

    def value(run: RunResult) -> float | None:
        for setting, at, _tokens, static, sequential, same in run.exposure.get(name, []):
            if (setting, at) == (memory, ratio):
                return float(sequential / (static if below == "static" else same))
        return None

    return value


def _evaluations(study: StudyResults, kind: str) -> list[str]:
    """Return the names of the evaluations of the shown arms, in the order of the results."""
    runs = [run for run in study.runs if run.arm in study.shown]
    return list(dict.fromkeys(name for run in runs for name in getattr(run, kind)))


def _each(runs: Mapping[int, RunResult], value: Callable[[RunResult], float | None]) -> Values:
    """Return a result of each run that has it, by seed."""
    values = {seed: value(run) for seed, run in runs.items()}
    return {seed: x for seed, x in values.items() if x is not None}


def _cell(values: Values, digits: int) -> str:
    if not values:
        return ""
    numbers = list(values.values())
    spread = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def _compared(
    study: StudyResults, arm: str, value: Callable[[RunResult], float | None], confidence: float, digits: int
) -> str:
    """Return the paired difference from the arm that this one is compared with; empty if there is none."""
    against = study.arms[arm].against
    if against == arm:
        return ""
    values = _each(study.of(arm), value)
    result = difference(values, _each(study.of(against), value), confidence)
    if result is None:
        return ""
    return result.text(digits) + (f" [{result.pairs} pairs]" if result.pairs < len(values) else "")


def plots(study: StudyResults, folder: Path, confidence: float) -> list[Path]:
    """Draw losses, differences, needle results by length and exposure bias; return the files.

    An arm has the same colour in all plots of a study. Solid lines are results with the memory off, dashed ones with
    the memory on; means over the seeds, with the standard deviation as bars.

    Args:
        study: results to show.
        folder: folder for the PNG files.
        confidence: confidence of the intervals of paired differences.
    """
    plt = report.pyplot()
    figures = {
        "losses.png": _draw_losses,
        "differences.png": _draw_differences,
        "lengths.png": _draw_lengths,
        "exposure.png": _draw_exposure,
    }
    written = []
    for name, function in figures.items():
        figure = function(plt, study, confidence)
        if figure is not None:
            report.save(figure, folder / name)
            written.append(folder / name)
    return written


def _colour(plt: Any, study: StudyResults, arm: str) -> Any:
    """Return the colour of an arm: by its number in the study, dark colours first."""
    colours = [c for name in ("tab20", "tab20b", "tab20c") for c in plt.get_cmap(name).colors]
    colours = [*colours[0:20:2], *colours[1:20:2], *colours[20:]]
    return colours[list(study.arms).index(arm) % len(colours)]


def _line(axis: Any, x: Sequence[float], runs: Sequence[Sequence[float]], memory: str, colour: Any) -> None:
    """Draw the mean over runs, with the standard deviation as bars."""
    columns = list(zip(*runs, strict=True))
    spread = [stdev(column) for column in columns] if len(runs) > 1 else None
    axis.errorbar(x, [mean(column) for column in columns], spread, linestyle=_STYLES[memory], marker=".", capsize=2,
                  color=colour)  # fmt: skip


def _legend(plt: Any, figure: Any, study: StudyResults) -> None:
    """Add a legend of the arms' colours and of the line styles below the panels."""
    lines = [plt.Line2D([], [], color=_colour(plt, study, arm), label=study.arms[arm].label) for arm in study.shown] + [
        plt.Line2D([], [], color="black", linestyle=style, label=f"memory {m}") for m, style in _STYLES.items()
    ]
    figure.legend(handles=lines, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.02))


def _draw_losses(plt: Any, study: StudyResults, confidence: float) -> Any:
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for arm in study.shown:
        runs = list(study.of(arm).values())
        for memory in MEMORY:
            curves = [getattr(run, memory) for run in runs if getattr(run, memory) and run.steps == runs[0].steps]
            if curves:
                _line(axis, runs[0].steps, curves, memory, _colour(plt, study, arm))
    axis.set(xlabel="step", ylabel="held-out loss (nats per token)", yscale="log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")
    _legend(plt, figure, study)
    return figure


def _draw_differences(plt: Any, study: StudyResults, confidence: float) -> Any:
    """Draw the paired difference of every arm's final loss with the memory off; bars are intervals."""
    compared = [arm for arm in study.shown if study.arms[arm].against != arm]
    results = {}
    for arm in compared:
        others = _each(study.of(study.arms[arm].against), _last_off)
        result = difference(_each(study.of(arm), _last_off), others, confidence)
        if result is not None:
            results[arm] = result
    if not results:
        return None
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.24 * len(results)))
    for row, (arm, result) in enumerate(results.items()):
        axis.errorbar([result.mean], [-row], xerr=result.half_width, marker="o", capsize=3,
                      color=_colour(plt, study, arm))  # fmt: skip
    labels = {arm: (study.arms[arm].label, study.arms[study.arms[arm].against].label) for arm in results}
    texts = [f"{label} (against {against})" for label, against in labels.values()]
    if len({against for _, against in labels.values()}) == 1:
        texts = [label for label, _ in labels.values()]
    axis.set_yticks([-row for row in range(len(texts))], texts, fontsize=7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=_LINEAR)  # harm can be a hundred times as large as what is to be told apart
    farthest = max(abs(result.mean) + (result.half_width or 0) for result in results.values())
    ticks = [x for x in (_LINEAR / 2, _LINEAR, 0.1, 1.0, 10.0) if x <= max(farthest, _LINEAR)]
    axis.set_xticks(
        [*(-x for x in reversed(ticks)), 0, *ticks],
        [*(f"{-x:g}" for x in reversed(ticks)), "0", *(f"{x:g}" for x in ticks)],
    )
    axis.minorticks_off()
    axis.set_xlabel("difference in held-out loss, memory off (nats per token)")
    return figure


def _draw_lengths(plt: Any, study: StudyResults, confidence: float) -> Any:
    """Draw accuracy and answer NLL, averaged over the tasks, against length: a row of panels per needle evaluation."""
    names = _evaluations(study, "scores")
    if not names:
        return None
    figure, panels = plt.subplots(len(names), 2, figsize=(11, 3.4 * len(names)), squeeze=False)
    for name, axes in zip(names, panels, strict=True):
        for axis, column in zip(axes, (_ACCURACY, _NLL), strict=True):
            lengths: set[int] = set()
            for arm in study.shown:
                runs = [run for run in study.of(arm).values() if name in run.scores]
                for memory in MEMORY:
                    x = sorted({row[_LENGTH] for run in runs for row in run.scores[name] if row[_MEMORY] == memory})
                    curves = _curves(runs, [_score(name, length, memory, column) for length in x])
                    if curves:
                        _line(axis, x, curves, memory, _colour(plt, study, arm))
                        lengths.update(x)
            axis.set(xscale="log", title=name, xlabel="length (tokens)")
            axis.set_xticks(sorted(lengths), map(str, sorted(lengths)))
            axis.minorticks_off()
        axes[0].set_ylabel("accuracy (%)")
        axes[1].set_ylabel("answer NLL (nats per token)")
    _legend(plt, figure, study)
    return figure


def _curves(runs: Sequence[RunResult], points: Sequence[Callable[[RunResult], float | None]]) -> list[list[float]]:
    """Return the values of each run at all points; runs that lack one are left out."""
    curves = [[point(run) for point in points] for run in runs]
    return [[x for x in curve if x is not None] for curve in curves if curve and None not in curve]


def _draw_exposure(plt: Any, study: StudyResults, confidence: float) -> Any:
    """Draw R_EB, and its part at the same positions, against the mask ratio: a row of panels per evaluation."""
    names = _evaluations(study, "exposure")
    if not names:
        return None
    figure, panels = plt.subplots(len(names), 2, figsize=(11, 3.6 * len(names)), sharey=True, squeeze=False)
    for name, axes in zip(names, panels, strict=True):
        for axis, below in zip(axes, ("static", "same positions"), strict=True):
            for arm in study.shown:
                runs = [run for run in study.of(arm).values() if name in run.exposure]
                for memory in MEMORY:
                    x = sorted({row[1] for run in runs for row in run.exposure[name] if row[0] == memory})
                    curves = _curves(runs, [_exposure(name, memory, ratio, below) for ratio in x])
                    if curves:
                        _line(axis, x, curves, memory, _colour(plt, study, arm))
            axis.set(xlabel="mask ratio", title="R_EB" if below == "static" else "at the same positions")
        axes[0].set_ylabel("ratio of losses")
    _legend(plt, figure, study)
    return figure
