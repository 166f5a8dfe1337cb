"""Check that the base model does not come to depend on its memory: validation losses with the memory off and on."""

import math


class MemoryDependence:
    """Detects a base model that comes to depend on fast weights that were just written on its targets.

    The sign is a loss with the memory off that is above its best by more than 1 % while the loss with the memory on
    is below what it was then.
    """

    def __init__(self) -> None:
        self._step, self._off, self._on = 0, math.inf, math.inf

    def check(self, step: int, off: float, on: float) -> str:
        """Return a warning as one sentence; empty if there is nothing to warn of."""
        if off <= self._off:
            self._step, self._off, self._on = step, off, on
            return ""
        if off <= 1.01 * self._off or on >= self._on:
            return ""
        return (
            f"The held-out loss with the memory off rose from {self._off:.4f} (step {self._step}) to {off:.4f}, while "
            f"with the memory on it fell from {self._on:.4f} to {on:.4f}: the model comes to lean on its fast weights, "
            "and will be worse without them; start from a pre-trained base (checkpoint.initial_load_path), or lower "
            "parametric_memory.probability, parametric_memory.learning_rate or optimizer.lr."
        )
