"""Evaluation of trained models: needle tasks, exposure bias and the lm-evaluation-harness."""
