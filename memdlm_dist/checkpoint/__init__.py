"""Checkpoints: inspection, comparison with a run, saving, loading, retention, and conversion to Hugging Face."""
