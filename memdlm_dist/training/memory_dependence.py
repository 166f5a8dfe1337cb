"""Warning that the base model depends on its memory, from the validation losses with the memory off and on."""

import math


class MemoryDependence:
    """Detector of a base model that has come to depend on its fast weights.

    Fast weights train on the same targets as the loss, so a base model can learn to rely on them.

    Warns if the memory-off loss exceeds its lowest value by more than 1 %, while the memory-on loss is below its value
    at the step of that lowest memory-off loss.
    """

    def __init__(self) -> None:
        self._step, self._off, self._on = 0, math.inf, math.inf

    def check(self, step: int, off: float, on: float) -> str:
        """Return the warning as one sentence, or an empty string; losses in nats per token."""
        if off <= self._off:
            self._step, self._off, self._on = step, off, on
            return ""
        if off <= 1.01 * self._off or on >= self._on:
            return ""
        return (
            f"The held-out loss with the memory off rose from {self._off:.4f} (step {self._step}) to {off:.4f}, while "
            f"with the memory on it fell from {self._on:.4f} to {on:.4f}: the base model comes to depend on its fast "
            "weights and gets worse without them; start from a pre-trained base (checkpoint.initial_load_path), or "
            "lower parametric_memory.learning_rate, parametric_memory.probability or optimizer.lr, or raise "
            "parametric_memory.samples_per_set."
        )
