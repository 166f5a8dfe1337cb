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

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.comparison import JSON, PNG, cells_of, compare_losses, compare_scores, draw, show
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import NeedleGenerator
from memdlm_dist.evaluation.needle_arguments import add_needle_arguments, get_sizes, get_tasks
from memdlm_dist.evaluation.retrieval import MEMORY, evaluate
from memdlm_dist.inference.model_arguments import add_decoding_arguments, add_model_arguments, get_decoding, load_model
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, positive
from memdlm_dist.runtime.rank_0 import is_rank_0


def parser() -> argparse.ArgumentParser:
    p = new_parser("evaluate.py", __doc__)
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
    tasks, sizes, decoding = get_tasks(options), get_sizes(options), get_decoding(options)
    if not options.new_tokens:
        raise UserError("--new-tokens must be at least 1: answers need room.")
    report.check_output(options.output, JSON, PNG, overwrite=options.overwrite)
    report.pyplot()  # says now that it is missing, not when all is measured
    hay = Haystack.read(options.part, options.haystack)
    model = load_model(options, overrides, options.checkpoint)
    try:
        needles = NeedleGenerator(model.tokenizer, hay, options.part, sizes, options.seed)
        for task in tasks:
            for length in options.lengths:
                needles.sample(task, length, 0)  # says now that it does not fit
        questions = len(tasks) * len(options.lengths) * options.samples * len(memories)
        with tqdm(total=questions, unit=" questions", disable=not is_rank_0()) as bar:
            scores, records = evaluate(
                model, needles, tasks, options.lengths, options.samples, memories, decoding, options.new_tokens,
                options.batch_size, options.anchor_ratio, bar.update,
            )  # fmt: skip
        checkpoint = model.checkpoint
    finally:
        model.close()
    if is_rank_0():
        show(scores, memories)
        settings = {"sizes": asdict(sizes), "seed": options.seed, "part": options.part, "decoding": asdict(decoding),
                    "new_tokens": options.new_tokens, "anchor_ratio": options.anchor_ratio}  # fmt: skip
        found = {"checkpoint": checkpoint, "settings": settings, "scores": [asdict(score) for score in scores]}
        report.write_json(options.output / JSON, {**found, "answers": records})
        arms = {f"memory {memory}": [found] for memory in memories}
        draw({name: cells_of(arms[name], name.split()[1]) for name in arms}, options.output / PNG)
        print(f"{checkpoint}: written to {options.output / JSON} and {options.output / PNG}")
    return 0


def run_comparison(options: argparse.Namespace) -> int:
    compare = compare_scores if options.command == "compare" else compare_losses
    compare(options.arms, options.output, options.overwrite)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse_with_overrides(parser(), argv)
    if options.command == "needle":
        return guarded(lambda: run_needle(options, overrides))
    return guarded(lambda: run_comparison(options))


if __name__ == "__main__":
    sys.exit(main())
