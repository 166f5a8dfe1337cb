#!/usr/bin/env python
r"""Write a backbone with random weights as a Hugging Face folder, to try a recipe without the published weights.

Example:
  python tools/random_weights.py train_configs/llada_8b_longalpaca.toml --output outputs/random --model.flavor debug \
      --model.hf_assets_path tests/assets/debug/tokenizer

The folder has the published tensor names, the index, config.json, and the tokenizer of model.hf_assets_path.
checkpoint.initial_load_in_hf loads it like the published folder. Override configuration keys with --section.key value.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.checkpoint import hugging_face_folder
from memdlm_dist.config import parse_config
from memdlm_dist.errors import require
from memdlm_dist.models.state_dict_adapters import in_dtype
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, quiet
from memdlm_dist.training.backbone import get_sd_adapter


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("random_weights.py", __doc__)
    p.usage = "random_weights.py CONFIG --output DIR [options] [--section.key value ...]"
    model = p.add_argument_group("model")
    model.add_argument("config", metavar="CONFIG", help="TOML file that names the backbone")
    model.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default: 0)")
    output = p.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    output.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="dtype of the written tensors (default: bfloat16)")  # fmt: skip
    return p


def make(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Write the folder and return the exit status.

    Raises:
        UserError: if the output folder exists and is not empty.
    """
    quiet()
    config = parse_config.parse(["--job.config_file", options.config, *overrides])
    sd_adapter = get_sd_adapter(config)
    output = Path(options.output)
    require(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"{output} exists and is not an empty folder; choose another --output, or remove it.",
    )
    torch.manual_seed(options.seed)
    model = sd_adapter.model_cls(sd_adapter.args)
    with torch.no_grad():
        model.init_weights()
    state = in_dtype(model.state_dict(), getattr(torch, options.dtype))
    hugging_face_folder.write(sd_adapter.to_hf(state), str(output))
    written = hugging_face_folder.describe(str(output), sd_adapter, [hub.tokenizer(config.model.hf_assets_path)])
    parameters = sum(tensor.numel() for tensor in state.values())
    print(f"{output}: {config.model.name} {config.model.flavor}, {parameters:,} parameters; {', '.join(written)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: make(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
