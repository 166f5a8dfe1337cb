"""Recipes of published models, and access to weights in Hugging Face's format."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RECIPES = {
    "llada": "train_configs/llada_8b_longalpaca.toml",
    "llada_moe": "train_configs/llada_moe_7b_longalpaca.toml",
    "llada2": "train_configs/llada21_mini_longalpaca.toml",
}
# Overrides with which a recipe trains a model of debug size in seconds, on CPUs.
SMALL = [
    "--model.flavor", "debug", "--model.hf_assets_path", "tests/assets/debug/tokenizer",
    "--data.train", "tests/assets/debug/train", "--data.validation", "tests/assets/debug/heldout",
    "--validation.steps", "1", "--training.seq_len", "128", "--training.steps", "3",
    "--training.global_batch_size", "4", "--training.local_batch_size", "2",
    "--training.mixed_precision_param", "float32", "--optimizer.implementation", "foreach", "--optimizer.lr", "0.02",
    "--lr_scheduler.warmup_steps", "1", "--checkpoint.interval", "2", "--checkpoint.async_mode", "disabled",
    "--compile.no-enable", "--parametric_memory.rank", "8", "--metrics.log_freq", "1",
    "--lora.base", "unquantized", "--lora.dropout", "0",
]  # fmt: skip


def contents(folder):
    """Return all tensors of a folder's safetensors files by name."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def draw_expert_biases(folder):
    """Replace the experts' biases in a folder's safetensors files, zero in random weights, by random numbers."""
    generator = torch.Generator().manual_seed(0)
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        biases = {key: torch.randn(x.shape, generator=generator) for key, x in tensors.items() if "expert_bias" in key}
        if biases:
            save_file(tensors | biases, file, {"format": "pt"})
