#!/usr/bin/env python
"""Evaluate trained models: accuracy on needle tasks, memory off and on.

    python tools/evaluate.py needle CONFIG --lengths 512,1024 --output outputs/needle
    python tools/evaluate.py compare base=outputs/a mdlm=outputs/b0,outputs/b1 --output outputs/comparison

`needle` asks about facts hidden in real text (see tools/needle_data.py), with keys, names and passages that the
training part never uses, and writes needle.json and needle.png. Works under torchrun too. `compare` puts several such
results in one table: NAME=DIR,DIR,... are the runs of one kind that differ by their seed; accuracy is their mean and
spread (standard deviation). `losses` does so with the held-out losses of training runs (their validation.jsonl).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import Needles
from memdlm_dist.evaluation.needle_arguments import add_needle_arguments, sizes_of, tasks_of
from memdlm_dist.evaluation.retrieval import MEMORY, Score, evaluate
from memdlm_dist.inference.model_arguments import (
    add_decoding_arguments,
    add_model_arguments,
    decoding_of,
    guarded,
    is_first,
    load_model,
    parse,
    positive,
)
from memdlm_dist.training.validation_history import HISTORY_FILE, history
from memdlm_dist.training.validation_history import LOSSES as HELD_OUT

JSON, PNG, COMPARISON, LOSSES = "needle.json", "needle.png", "comparison", "losses"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    needle = commands.add_parser("needle", help="accuracy on needle tasks by task and length")
    add_model_arguments(needle)
    needle.add_argument("--memory", default="off,on", metavar="M", help="off, on or off,on (default: off,on)")
    needle.add_argument("--samples", type=positive, default=100, metavar="N",
                        help="questions of each task at each length (default: 100)")  # fmt: skip
    needle.add_argument("--part", choices=("heldout", "train"), default="heldout", help="default: heldout")
    needle.add_argument("--batch-size", type=positive, default=16, metavar="N", help="of a pass (default: 16)")
    add_needle_arguments(needle)
    add_decoding_arguments(needle, 64)
    compare = commands.add_parser("compare", help="one table and plot of several results")
    compare.add_argument("arms", nargs="+", metavar="NAME=DIR[,DIR]", help="results of the runs of one kind")
    losses = commands.add_parser("losses", help="held-out losses over the steps of several runs")
    losses.add_argument("arms", nargs="+", metavar="NAME=DIR[,DIR]", help="output folders of the runs of one kind")
    for command in (needle, compare, losses):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for JSON and plot")
        command.add_argument("--overwrite", action="store_true", help="replace results that are there")
    return p


def run_needle(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    memories = options.memory.split(",")
    if unknown := [memory for memory in memories if memory not in MEMORY]:
        raise UserError(f"--memory must be off, on or off,on, not {unknown[0]}.")
    tasks, sizes, decoding = tasks_of(options), sizes_of(options), decoding_of(options)
    if not options.new_tokens:
        raise UserError("--new-tokens must be at least 1: answers need room.")
    report.check_output(options.output, JSON, PNG, overwrite=options.overwrite)
    report.pyplot()  # says now that it is missing, not when all is measured
    hay = Haystack.read(options.part, options.haystack)
    model = load_model(options, overrides, options.checkpoint)
    try:
        needles = Needles(model.tokenizer, hay, options.part, sizes, options.seed)
        for task in tasks:
            for length in options.lengths:
                needles.sample(task, length, 0)  # says now that it does not fit
        questions = len(tasks) * len(options.lengths) * options.samples * len(memories)
        with tqdm(total=questions, unit=" questions", disable=not is_first()) as bar:
            scores, records = evaluate(
                model, needles, tasks, options.lengths, options.samples, memories, decoding, options.new_tokens,
                options.batch_size, options.anchor_ratio, bar.update,
            )  # fmt: skip
        checkpoint = model.checkpoint
    finally:
        model.close()
    if is_first():
        show(scores, memories)
        settings = {"sizes": asdict(sizes), "seed": options.seed, "part": options.part, "decoding": asdict(decoding),
                    "new_tokens": options.new_tokens, "anchor_ratio": options.anchor_ratio}  # fmt: skip
        found = {"checkpoint": checkpoint, "settings": settings, "scores": [asdict(score) for score in scores]}
        report.write_json(options.output / JSON, {**found, "answers": records})
        arms = {f"memory {memory}": [found] for memory in memories}
        draw({name: _cells(arms[name], name.split()[1]) for name in arms}, options.output / PNG)
        print(f"{checkpoint}: written to {options.output / JSON} and {options.output / PNG}")
    return 0


def show(scores: Sequence[Score], memories: Sequence[str]) -> None:
    """Accuracy by task and length, and the time that the memory took."""
    rows = []
    cells = {(score.task, score.length, score.memory): score for score in scores}
    for task, length in dict.fromkeys((score.task, score.length) for score in scores):
        found = [cells[task, length, memory] for memory in memories]
        accuracies = [f"{100 * score.accuracy:.1f} ± {100 * score.error:.1f}" for score in found]
        rows.append([task, str(length), *accuracies, *(f"{score.answer_nll:.3f}" for score in found)])
    header = [f"{what}memory {memory}" for what in ("", "answer NLL, ") for memory in memories]
    print(report.table(["accuracy (%)", "length", *header], rows))
    for memory in memories:
        of_it = [score for score in scores if score.memory == memory]
        decoding = sum(score.decoding_seconds for score in of_it)
        writing = sum(score.memory_seconds for score in of_it)
        added = f", writing the memory {writing:.1f} s more" if MEMORY[memory] else ""
        print(f"memory {memory}: decoding {decoding:.1f} s{added}, {sum(score.samples for score in of_it)} questions")


Cells = dict[tuple[str, int], list[float]]  # (task, length) -> what each run scored
# What is compared: key of a score -> heading and factor.
MEASURES = {"accuracy": ("accuracy (%)", 100.0), "answer_nll": ("answer NLL (nats per token)", 1.0)}


def _cells(results: Sequence[dict[str, Any]], memory: str, measure: str = "accuracy") -> Cells:
    cells: Cells = {}
    for result in results:
        for score in result["scores"]:
            if score["memory"] == memory:
                value = MEASURES[measure][1] * score[measure]
                cells.setdefault((score["task"], score["length"]), []).append(value)
    return cells


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def draw(arms: dict[str, Cells], path: Path) -> None:
    """Accuracy over the length, a panel for each task; bars are the standard deviation over seeds."""
    tasks = list(dict.fromkeys(task for cells in arms.values() for task, _ in cells))
    figure, axes = report.pyplot().subplots(1, len(tasks), figsize=(3 * len(tasks), 3.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, cells in arms.items():
            lengths = [length for found, length in cells if found == task]
            values = [cells[task, length] for length in lengths]
            axis.errorbar(
                lengths, list(map(mean, values)), list(map(_spread, values)), marker="o", capsize=3, label=name
            )
        axis.set(title=task, xlabel="length (tokens)", ylim=(-3, 103))
    axes[0][0].set_ylabel("accuracy (%)")
    axes[0][-1].legend(fontsize=7)
    report.save(figure, path)


def named_folders(arms: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """NAME=DIR,DIR as names and folders.

    Raises:
        UserError: for one that is not of that form.
    """
    found = []
    for text in arms:
        name, equals, folders = text.partition("=")
        if not equals or not folders:
            raise UserError(f"{text!r} names no results; write NAME=DIR, or NAME=DIR,DIR for several seeds.")
        found.append((name, [Path(folder) for folder in folders.split(",")]))
    return found


def run_losses(options: argparse.Namespace) -> int:
    """Held-out losses over the steps, by arm: mean and spread over the runs."""
    report.check_output(options.output, f"{LOSSES}.json", f"{LOSSES}.png", overwrite=options.overwrite)
    found: dict[str, dict[int, list[float]]] = {}
    for name, folders in named_folders(options.arms):
        for folder in folders:
            for row in history(folder / HISTORY_FILE):
                for key, label in zip(HELD_OUT, MEMORY, strict=True):
                    if key in row:
                        found.setdefault(f"{name}, memory {label}", {}).setdefault(int(row["step"]), []).append(
                            row[key]
                        )
    steps = sorted({step for curve in found.values() for step in curve})

    def cell(values: list[float]) -> str:
        return f"{mean(values):.4f} ± {_spread(values):.4f}" if values else "-"

    rows = [[str(step), *(cell(curve.get(step, [])) for curve in found.values())] for step in steps]
    print(report.table(["held-out loss at step", *found], rows))
    report.write_json(options.output / f"{LOSSES}.json", found)
    figure, axes = report.pyplot().subplots(1, len(MEMORY), figsize=(10, 3.6))
    for axis, memory in zip(axes, MEMORY, strict=True):
        for name, curve in found.items():
            if name.endswith(f"memory {memory}"):
                means, spreads = ([of(curve[step]) for step in sorted(curve)] for of in (mean, _spread))
                axis.errorbar(sorted(curve), means, spreads, marker=".", capsize=2, label=name.split(",")[0])
        axis.set(title=f"held-out loss, memory {memory}", xlabel="step", ylabel="nats per token")
        if axis.has_data():
            axis.legend(fontsize=8)
    report.save(figure, options.output / f"{LOSSES}.png")
    return 0


def run_compare(options: argparse.Namespace) -> int:
    report.check_output(options.output, f"{COMPARISON}.json", f"{COMPARISON}.png", overwrite=options.overwrite)
    arms: dict[str, dict[str, Cells]] = {}  # name -> measure -> cells
    settings: dict[str, Any] = {}
    for name, folders in named_folders(options.arms):
        results = [report.read_json(folder / JSON) for folder in folders]
        for folder, result in zip(folders, results, strict=True):
            if settings.setdefault("of", result["settings"]) != result["settings"]:
                raise UserError(f"{folder} was asked other questions than the first results; evaluate all alike.")
        for memory in MEMORY:
            if _cells(results, memory):
                arms[f"{name}, memory {memory}"] = {measure: _cells(results, memory, measure) for measure in MEASURES}
    keys = list(dict.fromkeys(key for cells in arms.values() for key in cells["accuracy"]))
    for measure, (heading, _) in MEASURES.items():
        rows = []
        for name, cells in arms.items():
            found = [cells[measure].get(key, []) for key in keys]
            averages = [mean(run) for run in zip(*filter(None, found), strict=True)]
            digits = 1 if measure == "accuracy" else 3
            texts = [
                f"{mean(values):.{digits}f} ± {_spread(values):.{digits}f}" if values else "-"
                for values in [*found, averages]
            ]
            rows.append([f"{name} ({max(map(len, found))})", *texts])
        print(report.table([heading, *(f"{task} {length}" for task, length in keys), "average"], rows) + "\n")
    report.write_json(
        options.output / f"{COMPARISON}.json",
        [{"arm": name, "measure": measure, "task": task, "length": length, "runs": values}
         for name, cells in arms.items() for measure in MEASURES
         for (task, length), values in cells[measure].items()],
    )  # fmt: skip
    draw({name: cells["accuracy"] for name, cells in arms.items()}, options.output / f"{COMPARISON}.png")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse(parser(), argv)
    if options.command == "needle":
        return guarded(lambda: run_needle(options, overrides))
    return guarded(lambda: run_compare(options) if options.command == "compare" else run_losses(options))


if __name__ == "__main__":
    sys.exit(main())
