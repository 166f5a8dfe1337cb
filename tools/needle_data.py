#!/usr/bin/env python
r"""Write a training corpus of needle tasks, which ask about facts hidden in real text, as JSONL for prepare_data.py.

Example, after launch/quickstart.sh:
  python tools/needle_data.py --tokenizer data/quickstart/tokenizer --lengths 1024 --samples 100 \
      --output data/needles.jsonl

Tasks: multi_value, variable_tracking and common_words follow RULER; facts_1 and facts_2 follow BABILong; repeat asks
for the words of the prompt in order. Each row has a `prompt` and a `response`. With --format text a row is one document
that joins both, for pre-training. The part "heldout" uses keys, names and passages that "train" never contains;
`tools/evaluate.py needle` asks about the held-out part.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.haystack import Haystack
from memdlm_dist.evaluation.needle import NeedleGenerator
from memdlm_dist.evaluation.needle_arguments import add_needle_arguments, get_sizes, get_tasks
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.entry_point import guarded, new_parser


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("needle_data.py", __doc__)
    p.usage = "needle_data.py --tokenizer DIR --lengths N,M --samples N --output FILE [options]"
    tasks = add_needle_arguments(p)
    tasks.add_argument(
        "--samples", type=int, required=True, metavar="N", help="number of samples of each task at each length"
    )
    tasks.add_argument("--part", choices=("train", "heldout"), default="train",
                       help="part whose keys, names and passages the samples use (default: train)")  # fmt: skip
    data = p.add_argument_group("data")
    data.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="folder of the tokenizer that measures the lengths, or repository ORG/NAME of the hub",
    )
    output = p.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    output.add_argument("--format", choices=("prompt_response", "text"), default="prompt_response",
                        help="fields of a row (default: prompt_response)")  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return p


def write(options: argparse.Namespace) -> int:
    """Write the corpus and return its number of rows.

    Raises:
        UserError: if the file exists, or a task or a size is not possible.
        OSError: if the file cannot be written.
    """
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists; choose another --output, or pass --overwrite to replace it.")
    tokenizer = DiffusionTokenizer(hub.tokenizer(options.tokenizer))
    hay = Haystack.read(options.part, options.haystack)
    needles = NeedleGenerator(tokenizer, hay, options.part, get_sizes(options), options.seed)
    tasks = get_tasks(options)
    # Tasks and lengths alternate, so that every section of the file is a mixture.
    plan = [(task, length, i) for i in range(options.samples) for length in options.lengths for task in tasks]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.output.with_name(options.output.name + ".unfinished")
    try:
        with open(unfinished, "w") as file:
            for task, length, index in tqdm(plan, unit=" rows", desc=str(options.output)):
                sample = needles.sample(task, length, index)
                if options.format == "text":
                    row = {"text": sample.prompt + sample.response}
                else:
                    row = {"prompt": sample.prompt, "response": sample.response}
                file.write(json.dumps({**row, "task": task, "length": length}) + "\n")
        unfinished.replace(options.output)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    p = parser()
    options = p.parse_args(argv)
    if options.samples < 1:
        p.error("--samples must be at least 1")
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Write the corpus, print its size, and return the exit status."""
    try:
        rows = write(options)
    except OSError as error:
        raise UserError(f"{options.output} cannot be written ({error}); choose another --output.") from None
    print(f"{options.output}: {rows:,} rows of the {options.part} part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
