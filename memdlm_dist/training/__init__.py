"""Trainer with the bi-level step, objective, metrics, validation and the per-step consensus."""
