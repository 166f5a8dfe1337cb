#!/usr/bin/env python
"""Exposure bias of one or several checkpoints on the same samples: static and sequential loss over mask ratios.

    python tools/exposure_bias.py CONFIG --checkpoint RUN_A/checkpoint RUN_B/checkpoint --output outputs/exposure

Static: the loss of masked response tokens while the others show the truth. Sequential: of those still masked when the
model has filled in the others itself, most confident first. Their ratio is the exposure bias; the last column is the
ratio at the same positions, where the truth or the model's choices stand in the others. Samples are those of
data.validation, or of --data. Writes exposure_bias.json and exposure_bias.png. Works under torchrun too.
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
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.exposure import RATIOS, measure
from memdlm_dist.evaluation.exposure_report import line, load_rows, plot
from memdlm_dist.evaluation.retrieval import MEMORY
from memdlm_dist.inference.model_arguments import add_model_arguments, load_model
from memdlm_dist.inference.setup import checkpoint_folder
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, positive
from memdlm_dist.runtime.rank_0 import is_rank_0

JSON, PNG = "exposure_bias.json", "exposure_bias.png"


def numbers(text: str) -> list[float]:
    """Comma-separated mask ratios, as an argument's type."""
    ratios = [float(part) for part in text.split(",")]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError
    return ratios


def parser() -> argparse.ArgumentParser:
    p = new_parser("exposure_bias.py", __doc__)
    add_model_arguments(p, several_checkpoints=True)
    p.add_argument("--names", nargs="+", metavar="NAME", help="of the checkpoints in table and plot")
    p.add_argument("--memory", default="off,on", metavar="M", help="off, on or off,on (default: off,on)")
    p.add_argument("--data", nargs="+", metavar="DIR", help="folders of shards (default: data.validation)")
    p.add_argument("--samples", type=positive, default=128, metavar="N", help="at most so many (default: 128)")
    p.add_argument("--ratios", type=numbers, default=list(RATIOS), metavar="R,S",
                   help="mask ratios (default: 0.1 to 0.9)")  # fmt: skip
    p.add_argument("--prompt-share", type=float, default=0.5, metavar="F",
                   help="of packed text, what is taken for the prompt (default: 0.5)")  # fmt: skip
    p.add_argument("--batch-size", type=positive, default=16, metavar="N", help="rows of a pass (default: 16)")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the JSON and the plot")
    p.add_argument("--overwrite", action="store_true", help="replace results that are there")
    return p


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    memories = options.memory.split(",")
    if unknown := [memory for memory in memories if memory not in MEMORY]:
        raise UserError(f"--memory must be off, on or off,on, not {unknown[0]}.")
    if not 0 < options.prompt_share < 1:
        raise UserError(f"--prompt-share must be between 0 and 1, but is {options.prompt_share}.")
    report.check_output(options.output, JSON, PNG, overwrite=options.overwrite)
    report.pyplot()  # says now that it is missing, not when all is measured
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    checkpoints = options.checkpoint or [checkpoint_folder(config)]
    names = options.names or [path.rstrip("/") for path in checkpoints]
    if len(names) != len(checkpoints):
        raise UserError(f"--names gives {len(names)} names for {len(checkpoints)} checkpoints.")
    model = load_model(options, overrides, checkpoints[0])
    try:
        rows = load_rows(config, model, options.data, options.samples, options.prompt_share)
        results, lines = [], []
        total = len(rows) * len(checkpoints) * len(memories)
        with tqdm(total=total, unit=" rows", disable=not is_rank_0()) as bar:
            for number, (name, checkpoint) in enumerate(zip(names, checkpoints, strict=True)):
                if number:
                    model.load(checkpoint)
                for memory in memories:
                    points = measure(
                        model,
                        rows,
                        MEMORY[memory],
                        options.ratios,
                        options.batch_size,
                        options.anchor_ratio,
                        bar.update,
                    )
                    results.append({"name": name, "checkpoint": model.checkpoint, "memory": memory,
                                    "points": [asdict(point) for point in points]})  # fmt: skip
                    lines += [line(name, memory, point) for point in points]
    finally:
        model.close()
    if is_rank_0():
        header = ["", "mask ratio", "static", "sequential", "same positions", "R_EB", "R at same positions"]
        print(report.table(header, lines))
        report.write_json(options.output / JSON, {"samples": len(rows), "results": results})
        plot(results, options.output / PNG)
        print(f"{len(rows)} samples; written to {options.output / JSON} and {options.output / PNG}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
