"""The trainer with its bi-level step, the objective, metrics, validation and per-step agreement."""
