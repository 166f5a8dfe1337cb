#!/usr/bin/env python
r"""Measure the exposure bias of one or several checkpoints on the same samples.

Examples, after bash launch/quickstart.sh:
  python tools/exposure_bias.py train_configs/quickstart.toml --samples 4 --output outputs/exposure
  python tools/exposure_bias.py train_configs/quickstart.toml --samples 4 --output outputs/exposure-steps \
      --checkpoint outputs/quickstart/checkpoint/step-160 outputs/quickstart/checkpoint/step-240 --names early late

For each mask ratio the table shows two losses of the response tokens. Static: the other response tokens are the true
ones. Sequential: the model has filled in the other response tokens itself, most confident first, and the loss covers
the tokens that are still masked. The exposure bias R_EB is sequential over static loss. The last column divides the
sequential loss by the static loss at the same masked positions. Writes exposure_bias.json and exposure_bias.png. Also
runs under torchrun. Override configuration keys with --section.key value.
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
from memdlm_dist.inference.memory_arguments import add_memory_arguments, check_memory_is_on, flags_of, get_memory
from memdlm_dist.inference.model_arguments import add_model_arguments, load_model
from memdlm_dist.inference.setup import checkpoint_folder
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, positive
from memdlm_dist.runtime.rank_0 import is_rank_0

JSON, PNG = "exposure_bias.json", "exposure_bias.png"


def numbers(text: str) -> list[float]:
    """Parse comma-separated mask ratios above 0, at most 1, as an argument's type."""
    ratios = [float(number) for number in text.split(",")]
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError
    return ratios


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("exposure_bias.py", __doc__)
    p.usage = "exposure_bias.py CONFIG --output DIR [options] [--section.key value ...]"
    add_model_arguments(p, several_checkpoints=True)
    add_memory_arguments(p, decodes=False).add_argument(
        "--memory", default="off,on", metavar="M", help="memory modes to measure: off, on or off,on (default: off,on)"
    )
    data = p.add_argument_group("data")
    data.add_argument("--data", nargs="+", metavar="DIR", help="folders of shards (default: data.validation)")
    data.add_argument("--samples", type=positive, default=128, metavar="N",
                      help="maximum number of samples (default: 128)")  # fmt: skip
    data.add_argument("--prompt-share", type=float, default=0.5, metavar="F",
                      help="share of a row of packed text that serves as the prompt (default: 0.5)")  # fmt: skip
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--ratios", type=numbers, default=list(RATIOS), metavar="R,S",
                          help="comma-separated mask ratios (default: 0.1 to 0.9)")  # fmt: skip
    sampling.add_argument("--batch-size", type=positive, default=16, metavar="N",
                          help="number of rows per forward pass (default: 16)")  # fmt: skip
    output = p.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the JSON file and the plot"
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing results in DIR")
    output.add_argument("--names", nargs="+", metavar="NAME",
                        help="labels for the checkpoints in the table and plot (default: their paths)")  # fmt: skip
    return p


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Measure every checkpoint, write the JSON file and the plot, and return the exit status.

    Raises:
        UserError: if an option is out of range or the output folder has results already.
    """
    memories = options.memory.split(",")
    if "on" not in memories:
        check_memory_is_on(flags_of(get_memory(options)))
    if unknown := [memory for memory in memories if memory not in MEMORY]:
        raise UserError(f"--memory must be off, on or off,on, not {unknown[0]}.")
    if not 0 < options.prompt_share < 1:
        raise UserError(f"--prompt-share must be between 0 and 1, but is {options.prompt_share}.")
    report.check_output(options.output, JSON, PNG, overwrite=options.overwrite)
    report.pyplot()  # fails before the measurement if matplotlib is missing
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    checkpoints = options.checkpoint or [checkpoint_folder(config)]
    names = options.names or [path.rstrip("/") for path in checkpoints]
    if len(names) != len(checkpoints):
        raise UserError(f"--names gives {len(names)} names for {len(checkpoints)} checkpoints; give one for each.")
    if options.checkpoint:  # the run's own folder is never a repository
        checkpoints = [hub.weights(path) for path in checkpoints]
    model = load_model(options, overrides, checkpoints[0] if options.checkpoint else None, memory="on" in memories)
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
                        get_memory(options) if MEMORY[memory] else None,
                        options.ratios,
                        options.batch_size,
                        bar.update,
                    )
                    results.append({"name": name, "checkpoint": model.checkpoint, "adapter": model.adapter,
                                    "memory": memory, "points": [asdict(point) for point in points]})  # fmt: skip
                    lines += [line(name, memory, point) for point in points]
    finally:
        model.close()
    if is_rank_0():
        header = ["", "mask ratio", "static", "sequential", "same positions", "R_EB", "R at same positions"]
        print(report.table(header, lines))
        report.write_json(
            options.output / JSON, {"samples": len(rows), "memory_weights": options.memory_weights, "results": results}
        )
        plot(results, options.output / PNG)
        print(f"{len(rows)} samples; written to {options.output / JSON} and {options.output / PNG}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: run(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
