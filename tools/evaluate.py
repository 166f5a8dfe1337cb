#!/usr/bin/env python
r"""Evaluate trained models without and with memory, and compare results of several runs.

Examples, after bash launch/quickstart.sh:
  python tools/evaluate.py recall train_configs/quickstart.toml --anchor-ratio 0.5 \
      --parametric_memory.inner_epochs 16 --parametric_memory.learning_rate 1
  python tools/evaluate.py needle train_configs/quickstart.toml --tasks facts_1 --lengths 256 --samples 10 \
      --new-tokens 16 --output outputs/needles
  python tools/evaluate.py compare quickstart=outputs/needles --output outputs/comparison
  python tools/evaluate.py losses quickstart=outputs/quickstart --output outputs/losses

`evaluate.py COMMAND --help` describes a command and its options.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import recall, report
from memdlm_dist.evaluation.comparison import JSON, PNG, cells_of, compare_losses, compare_scores, draw, show
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import NeedleGenerator
from memdlm_dist.evaluation.needle_arguments import add_needle_arguments, get_sizes, get_tasks
from memdlm_dist.evaluation.retrieval import MEMORY, evaluate
from memdlm_dist.inference.memory_arguments import add_memory_arguments, check_memory_is_on, flags_of, get_memory
from memdlm_dist.inference.model_arguments import add_decoding_arguments, add_model_arguments, get_decoding, load_model
from memdlm_dist.runtime.entry_point import add_command, guarded, new_parser, parse_with_overrides, positive
from memdlm_dist.runtime.rank_0 import is_rank_0

_NEEDLE = """Measure the accuracy of a trained model on needle tasks, by task and length.

Examples:
  python tools/evaluate.py needle train_configs/quickstart.toml --tasks facts_1 --lengths 256 --samples 10 \\
      --new-tokens 16 --output outputs/needles
  python tools/evaluate.py needle train_configs/quickstart.toml --tasks facts_1,facts_2 --lengths 192,256 \\
      --samples 4 --new-tokens 16 --memory on --output outputs/facts

The tasks ask about facts hidden in real text (tools/needle_data.py). The held-out part uses keys, names and passages
that the training part never contains. Writes needle.json and needle.png. Also runs under torchrun. Override
configuration keys with --section.key value.
"""
_RECALL = """Show what the memory keeps of held-out passages: hidden tokens are predicted with it and without it.

Examples:
  python tools/evaluate.py recall train_configs/quickstart.toml
  python tools/evaluate.py recall train_configs/quickstart.toml --anchor-ratio 0.5 \\
      --parametric_memory.inner_epochs 16 --parametric_memory.learning_rate 1

The inner loop reads whole passages. Then half of each passage's tokens are hidden and predicted: without memory, with
the memory of another passage, and with the passage's own. The table also counts how many of the words that a memory
makes likelier by most are in the passage. The hidden tokens were read before, so this is recall, not generalisation.
The inner loop is the configuration's; override its keys with --section.key value. Also runs under torchrun.
"""
_COMPARE = """Show the needle results of several runs in one table and plot.

Example, on a folder that `needle` has written:
  python tools/evaluate.py compare quickstart=outputs/needles --output outputs/comparison

NAME=DIR,DIR,... names one kind of run and its results for different seeds. The table shows mean and standard deviation
of the accuracy over the seeds. Writes comparison.json and comparison.png.
"""
_LOSSES = """Show the held-out losses of several training runs over their steps.

Example:
  python tools/evaluate.py losses quickstart=outputs/quickstart --output outputs/losses

NAME=DIR,DIR,... names one kind of run and its output folders for different seeds. The losses are read from each run's
validation.jsonl; the table shows their mean and standard deviation. Writes losses.json and losses.png.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser with its subcommands."""
    p = new_parser("evaluate.py", __doc__)
    p.usage = "evaluate.py {needle,recall,compare,losses} ... [options]"
    commands = p.add_subparsers(title="commands", dest="command", required=True, prog="evaluate.py", metavar="COMMAND")
    needle = add_command(commands, "needle", _NEEDLE)
    needle.usage = "evaluate.py needle CONFIG --lengths N,M --output DIR [options] [--section.key value ...]"
    add_model_arguments(needle)
    add_memory_arguments(needle, decodes=True).add_argument(
        "--memory", default="off,on", metavar="M", help="memory modes to measure: off, on or off,on (default: off,on)"
    )
    tasks = add_needle_arguments(needle)
    tasks.add_argument("--samples", type=positive, default=100, metavar="N",
                       help="number of questions of each task at each length (default: 100)")  # fmt: skip
    tasks.add_argument("--part", choices=("heldout", "train"), default="heldout",
                       help="part whose keys, names and passages the questions use (default: heldout)")  # fmt: skip
    decoding = add_decoding_arguments(needle, 64)
    decoding.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="number of questions per forward pass (default: 16)",
    )
    reading = add_command(commands, "recall", _RECALL)
    reading.usage = "evaluate.py recall CONFIG [options] [--section.key value ...]"
    add_model_arguments(reading)
    add_memory_arguments(reading, decodes=False)
    passages = reading.add_argument_group("passages")
    passages.add_argument("--data", nargs="+", metavar="DIR", help="folders of shards (default: data.validation)")
    passages.add_argument("--pairs", type=positive, default=8, metavar="N",
                          help="number of pairs of passages, at even distances in the data (default: 8)")  # fmt: skip
    passages.add_argument("--shown", type=int, default=3, metavar="N",
                          help="number of passages to show with their words (default: 3)")  # fmt: skip
    passages.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the hidden tokens (default: 0)")
    passages.add_argument("--batch-size", type=positive, default=1, metavar="N",
                          help="number of pairs per forward pass (default: 1)")  # fmt: skip
    compare, losses = add_command(commands, "compare", _COMPARE), add_command(commands, "losses", _LOSSES)
    for command, folders in ((compare, "folders of its needle results"), (losses, "output folders of its runs")):
        command.usage = (
            f"evaluate.py {'compare' if command is compare else 'losses'} NAME=DIR[,DIR ...] ... --output DIR"
        )
        data = command.add_argument_group("data")
        data.add_argument("arms", nargs="+", metavar="NAME=DIR[,DIR]", help=f"name of one kind of run, and {folders}")
    for command in (needle, compare, losses):
        output = command.add_argument_group("output")
        output.add_argument(
            "--output", type=Path, required=True, metavar="DIR", help="folder for the JSON file and the plot"
        )
        output.add_argument("--overwrite", action="store_true", help="replace existing results in DIR")
    return p


def run_needle(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Ask the needle questions, write needle.json and needle.png, and return the exit status.

    Raises:
        UserError: if an option is out of range or the output folder has results already.
    """
    memories = options.memory.split(",")
    if unknown := [name for name in memories if name not in MEMORY]:
        raise UserError(f"--memory must be off, on or off,on, not {unknown[0]}.")
    tasks, sizes, decoding, memory = get_tasks(options), get_sizes(options), get_decoding(options), get_memory(options)
    if "on" not in memories:
        check_memory_is_on(flags_of(memory))
    if not options.new_tokens:
        raise UserError("--new-tokens must be at least 1, because the answer is decoded into these tokens.")
    report.check_output(options.output, JSON, PNG, overwrite=options.overwrite)
    report.pyplot()  # fails before the measurement if matplotlib is missing
    hay = Haystack.read(options.part, options.haystack)
    model = load_model(options, overrides, options.checkpoint, decoding, memory="on" in memories)
    try:
        needles = NeedleGenerator(model.tokenizer, hay, options.part, sizes, options.seed)
        for task in tasks:
            for length in options.lengths:
                needles.sample(task, length, 0)  # fails before the measurement if a length is too short
        questions = len(tasks) * len(options.lengths) * options.samples * len(memories)
        with tqdm(total=questions, unit=" questions", disable=not is_rank_0()) as bar:
            scores, records = evaluate(
                model, needles, tasks, options.lengths, options.samples,
                {name: memory if MEMORY[name] else None for name in memories}, decoding, options.new_tokens,
                options.batch_size, bar.update, warm_up=True,
            )  # fmt: skip
        checkpoint, adapter = model.checkpoint, model.adapter
    finally:
        model.close()
    if is_rank_0():
        show(scores)
        settings = {"sizes": asdict(sizes), "seed": options.seed, "part": options.part, "decoding": asdict(decoding),
                    "new_tokens": options.new_tokens, "anchor_ratio": memory.anchor_ratio,
                    "memory_weights": options.memory_weights, "memory_chunk": memory.chunk,
                    "memory_refresh": memory.refresh, "memory_from": memory.start}  # fmt: skip
        results = {"checkpoint": checkpoint, "adapter": adapter, "settings": settings,
                   "scores": [asdict(score) for score in scores]}  # fmt: skip
        report.write_json(options.output / JSON, {**results, "answers": records})
        arms = {f"memory {name}": [results] for name in memories}
        draw({name: cells_of(arms[name], name.split()[1]) for name in arms}, options.output / PNG)
        print(f"{checkpoint}: written to {options.output / JSON} and {options.output / PNG}")
    return 0


def run_recall(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure the recall of held-out passages, print it on rank 0, and return the exit status.

    Raises:
        UserError: if an option is out of range or there are too few passages.
    """
    if options.shown < 0:
        raise UserError(f"--shown must be at least 0, but is {options.shown}.")
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    model = load_model(options, overrides, options.checkpoint)
    try:
        pairs = recall.load_pairs(config, model, options.data, options.pairs)
        with tqdm(total=len(pairs), unit=" pairs", disable=not is_rank_0()) as bar:
            recalls = recall.measure(model, pairs, options.batch_size, get_memory(options), options.seed, bar.update)
    finally:
        model.close()
    if is_rank_0():
        print(recall.describe(config, get_memory(options), len(recalls)), "", sep="\n")
        print("\n".join(recall.lines(recalls, options.shown)))
    return 0


def run_comparison(options: argparse.Namespace) -> int:
    """Compare needle results (`compare`) or held-out losses (`losses`) and return the exit status."""
    compare = compare_scores if options.command == "compare" else compare_losses
    compare(options.arms, options.output, options.overwrite)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    if options.command == "needle":
        return guarded(lambda: run_needle(options, overrides))
    if options.command == "recall":
        return guarded(lambda: run_recall(options, overrides))
    return guarded(lambda: run_comparison(options))


if __name__ == "__main__":
    sys.exit(main())
