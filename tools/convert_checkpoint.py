#!/usr/bin/env python
r"""Convert checkpoints from and to Hugging Face weights (safetensors), and merge adapters into weights.

Examples, after bash launch/quickstart.sh:
  python tools/convert_checkpoint.py to-hf train_configs/quickstart.toml --output exports/quickstart
  python tools/convert_checkpoint.py from-hf train_configs/quickstart.toml --input exports/quickstart \
      --output checkpoints/quickstart

CONFIG names the backbone (model.name, model.flavor). Host memory holds the whole model once or twice, in the dtype of
the output. Override configuration keys with --section.key value. `convert_checkpoint.py COMMAND --help` describes a
command and its options.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.checkpoint.convert import from_hugging_face, merge_adapter, to_hugging_face
from memdlm_dist.config import parse_config, repositories
from memdlm_dist.inference.setup import adapter_config, checkpoint_folder
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.entry_point import add_command, guarded, new_parser, parse_with_overrides, quiet
from memdlm_dist.training.backbone import get_conversion

_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_FROM_HF = """Convert a folder of Hugging Face weights to a checkpoint.

Example, on a folder that `to-hf` has written:
  python tools/convert_checkpoint.py from-hf train_configs/quickstart.toml --input exports/quickstart \\
      --output checkpoints/quickstart

A run starts from the checkpoint with checkpoint.initial_load_path. It can also load the Hugging Face folder directly,
with checkpoint.initial_load_in_hf. The command copies config.json, modelling code and the tokenizer.
"""
_TO_HF = """Convert a checkpoint to a folder of Hugging Face weights.

Examples:
  # After bash launch/quickstart.sh
  python tools/convert_checkpoint.py to-hf train_configs/quickstart.toml --output exports/quickstart
  # After a run that trained LoRA adapters
  python tools/convert_checkpoint.py to-hf train_configs/llada_8b_longalpaca.toml --output exports/lora --adapter

The export merges the adapters of a LoRA run into the weights; --adapter writes the adapters alone, in PEFT's layout.
The command copies config.json, modelling code and the tokenizer, and executes none of the code.
"""


_MERGE = """Merge an adapter in PEFT's layout into Hugging Face weights.

Example, with the adapter of a LoRA run and the weights that the run started from:
  python tools/convert_checkpoint.py merge train_configs/llada_8b_longalpaca.toml --input checkpoints/LLaDA-8B-Base \\
      --adapter exports/lora --output exports/merged

Rank, alpha and linears come from the adapter's adapter_config.json and tensors, not from CONFIG. The sum is computed in
float32. The command copies config.json, modelling code and the tokenizer, and executes none of the code.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser with its three subcommands."""
    p = new_parser("convert_checkpoint.py", __doc__)
    p.usage = "convert_checkpoint.py {from-hf,to-hf,merge} CONFIG --output DIR [options] [--section.key value ...]"
    commands = p.add_subparsers(
        title="commands", dest="direction", required=True, prog="convert_checkpoint.py", metavar="COMMAND"
    )
    from_hf, to_hf = add_command(commands, "from-hf", _FROM_HF), add_command(commands, "to-hf", _TO_HF)
    merge = add_command(commands, "merge", _MERGE)
    merge.usage = (
        "convert_checkpoint.py merge CONFIG --input DIR --adapter DIR --output DIR [options] [--section.key value ...]"
    )
    from_hf.usage = "convert_checkpoint.py from-hf CONFIG --input DIR --output DIR [options] [--section.key value ...]"
    to_hf.usage = "convert_checkpoint.py to-hf CONFIG --output DIR [options] [--section.key value ...]"
    for command, config_help in (
        (from_hf, "TOML file that names the backbone"),
        (to_hf, "TOML file of the run that trained the model"),
        (merge, "TOML file that names the backbone"),
    ):
        model = command.add_argument_group("model")
        model.add_argument("config", metavar="CONFIG", help=config_help)
        if command is not to_hf:
            model.add_argument(
                "--input",
                required=True,
                metavar="DIR",
                help="folder of *.safetensors files with Hugging Face's names, or repository ORG/NAME of the hub",
            )
        if command is merge:
            model.add_argument(
                "--adapter",
                required=True,
                metavar="DIR",
                help="folder of an adapter in PEFT's layout, or repository ORG/NAME of the hub",
            )
        if command is to_hf:
            model.add_argument(
                "--checkpoint",
                metavar="DIR",
                help="folder of a checkpoint step-N, or folder or URL of several (the newest intact one is converted; "
                "default: the run's checkpoints). Load only checkpoints that you trust: their metadata is a pickle",
            )
            model.add_argument(
                "--assets",
                metavar="DIR",
                help="folder of config.json, modelling code and tokenizer, or repository ORG/NAME of the hub (default: "
                "the checkpoint, the run's initial weights or model.hf_assets_path)",
            )
        output = command.add_argument_group("output")
        output.add_argument("--output", required=True, metavar="DIR", help="folder to create")
        output.add_argument(
            "--dtype", choices=_DTYPES, default="keep", help="dtype of the written tensors (default: keep each one's)"
        )
        if command is to_hf:
            output.add_argument(
                "--adapter", action="store_true", help="write only the adapters of a LoRA run, in PEFT's layout"
            )
    return p


def convert(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the chosen conversion and return the exit status; progress goes to standard error."""
    quiet()
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    began = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    dtype = _DTYPES[options.dtype]
    if options.direction == "from-hf":
        from_hugging_face(get_conversion(config), hub.weights(options.input), options.output, dtype, progress)
        source = options.input
    elif options.direction == "merge":
        source, adapter = hub.weights(options.input), hub.adapter(options.adapter)
        run = get_conversion(adapter_config(config, adapter))
        merge_adapter(run, source, adapter, options.output, dtype, progress)
        source = f"{options.input} + {options.adapter}"
    else:
        checkpoint = options.checkpoint or checkpoint_folder(config)
        assets = hub.description(options.assets) if options.assets else None
        run = get_conversion(config if assets else repositories.downloaded(config))
        source = to_hugging_face(run, checkpoint, options.output, dtype, assets, options.adapter, progress)
    print(f"{source} -> {options.output} ({time.perf_counter() - began:.1f} s)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: convert(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
