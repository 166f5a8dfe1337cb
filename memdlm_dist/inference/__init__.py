"""Inference with a trained model: loading on any layout, memory on prompts, decoding, likelihood."""
