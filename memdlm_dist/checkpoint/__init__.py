"""Checkpoints: which there are (catalogue), whether they continue a run (continuity), saving and loading (manager)."""
