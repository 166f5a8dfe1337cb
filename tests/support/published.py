"""Recipes of published models, and access to weights in Hugging Face's format."""

from pathlib import Path

from safetensors.torch import load_file

RECIPES = {"llada": "train_configs/llada_8b_longalpaca.toml", "llada_moe": "train_configs/llada_moe_7b_longalpaca.toml"}


def contents(folder):
    """Return all tensors of a folder's safetensors files by name."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
