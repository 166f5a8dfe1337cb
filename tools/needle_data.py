#!/usr/bin/env python
"""Make a training corpus of needle tasks: questions about facts hidden in real text, as JSONL for prepare_data.py.

    python tools/needle_data.py --tokenizer data/text/tokenizer --lengths 512 --samples 20000 --output needles.jsonl

Tasks: multi_value, variable_tracking, common_words (after RULER), facts_1, facts_2 (after BABILong). Each row has a
`prompt` and a `response`; --format text makes documents of the two together, for pre-training. The part "heldout"
uses keys, names and passages that "train" never does; tools/evaluate.py needle asks about those.
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
from memdlm_dist.runtime.entry_point import guarded, new_parser


def parser() -> argparse.ArgumentParser:
    p = new_parser("needle_data.py", __doc__)
    p.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer folder, by which lengths are measured")
    p.add_argument("--samples", type=int, required=True, metavar="N", help="of each task at each length")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    p.add_argument("--part", choices=("train", "heldout"), default="train", help="default: train")
    p.add_argument("--format", choices=("prompt_response", "text"), default="prompt_response", help="what a row holds")
    p.add_argument("--overwrite", action="store_true", help="replace FILE")
    add_needle_arguments(p)
    return p


def write(options: argparse.Namespace) -> int:
    """Write the corpus; returns the number of rows."""
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists; choose another --output, or pass --overwrite to replace it.")
    tokenizer = DiffusionTokenizer(options.tokenizer)
    hay = Haystack.read(options.part, options.haystack)
    needles = NeedleGenerator(tokenizer, hay, options.part, get_sizes(options), options.seed)
    tasks = get_tasks(options)
    # Tasks and lengths take turns, so that any piece of the file is a mixture.
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
    p = parser()
    options = p.parse_args(argv)
    if options.samples < 1:
        p.error("--samples must be at least 1")
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    try:
        rows = write(options)
    except OSError as error:
        raise UserError(f"{options.output} cannot be written: {error}.") from None
    print(f"{options.output}: {rows:,} rows of the {options.part} part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
