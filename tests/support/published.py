"""Recipes of published models, and folders of their weights."""

from pathlib import Path

from safetensors.torch import load_file

RECIPES = {"llada": "train_configs/llada_8b_longalpaca.toml", "llada_moe": "train_configs/llada_moe_7b_longalpaca.toml"}


def contents(folder):
    """Return all tensors of a folder in Hugging Face's format."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
