#!/usr/bin/env python
"""Convert checkpoints from and to Hugging Face weights (safetensors), offline.

    python tools/convert_checkpoint.py from-hf CONFIG --input LLaDA-8B-Base --output checkpoints/llada-8b
    python tools/convert_checkpoint.py to-hf CONFIG --output exports/mine [--dtype bfloat16]
    python tools/convert_checkpoint.py to-hf CONFIG --output exports/mine-lora --adapter

CONFIG names the backbone (model.name, model.flavor) and, for to-hf, the run whose newest good checkpoint is taken.
from-hf writes a checkpoint for checkpoint.initial_load_path; a run can also read the Hugging Face folder itself
(checkpoint.initial_load_in_hf). config.json and the tokenizer are carried along. A run that trained adapters is
exported with them merged, or with --adapter as the adapters alone in PEFT's layout. The whole model is held in memory
once or twice, in the type that it is written in. Keys of the configuration can follow: --section.key value.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.checkpoint.convert import from_hugging_face, to_hugging_face
from memdlm_dist.config import parse_config
from memdlm_dist.inference.setup import checkpoint_folder
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, quiet
from memdlm_dist.training.backbone import get_conversion

_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = new_parser("convert_checkpoint.py", __doc__)
    directions = p.add_subparsers(dest="direction", required=True, metavar="{from-hf,to-hf}")
    there = directions.add_parser("from-hf", help="Hugging Face weights to a checkpoint")
    there.add_argument(
        "--input", required=True, metavar="DIR", help="folder with *.safetensors under Hugging Face's names"
    )
    back = directions.add_parser("to-hf", help="a checkpoint to Hugging Face weights")
    back.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="checkpoint step-N, or a folder or URL of them (the newest good one); default: the run's own. One's own "
        "alone: its metadata is a pickle",
    )
    back.add_argument(
        "--assets", metavar="DIR", help="folder with config.json and tokenizer (default: where the run's are)"
    )
    back.add_argument("--adapter", action="store_true", help="the adapters of a LoRA run alone, in PEFT's layout")
    for direction in (there, back):
        direction.add_argument("config", metavar="CONFIG", help="TOML file that names the backbone")
        direction.add_argument("--output", required=True, metavar="DIR", help="folder to make")
        direction.add_argument(
            "--dtype", choices=_DTYPES, default="keep", help="of the tensors (default: keep that of each)"
        )
    return p


def convert(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    quiet()
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    began = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", file=sys.stderr, flush=True)

    dtype, run = _DTYPES[options.dtype], get_conversion(config)
    if options.direction == "from-hf":
        from_hugging_face(run, options.input, options.output, dtype, progress)
        source = options.input
    else:
        checkpoint = options.checkpoint or checkpoint_folder(config)
        source = to_hugging_face(run, checkpoint, options.output, dtype, options.assets, options.adapter, progress)
    print(f"{source} -> {options.output} ({time.perf_counter() - began:.1f} s)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: convert(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
