#!/usr/bin/env python
"""Write a backbone with random weights as a Hugging Face folder: to try a recipe where the real weights are not.

    python tools/random_weights.py train_configs/llada_8b_longalpaca.toml --output /tmp/llada --model.flavor debug

The folder has the real names, the index, config.json and the tokenizer of model.hf_assets_path, and
checkpoint.initial_load_in_hf reads it as it does the published one. Keys of the configuration can follow:
--section.key value.
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
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, quiet
from memdlm_dist.training.backbone import get_sd_adapter


def parser() -> argparse.ArgumentParser:
    p = new_parser("random_weights.py", __doc__)
    p.add_argument("config", metavar="CONFIG", help="TOML file that names the backbone")
    p.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the tensors (bfloat16)")
    return p


def make(options: argparse.Namespace, overrides: Sequence[str]) -> int:
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
    state = {name: tensor.to(getattr(torch, options.dtype)) for name, tensor in model.state_dict().items()}
    hugging_face_folder.write(sd_adapter.to_hf(state), str(output))
    made = hugging_face_folder.describe(str(output), sd_adapter, [config.model.hf_assets_path])
    parameters = sum(tensor.numel() for tensor in state.values())
    print(f"{output}: {config.model.name} {config.model.flavor}, {parameters:,} parameters; {', '.join(made)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: make(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
