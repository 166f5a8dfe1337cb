"""Statistics of a study: differences paired by seed, their confidence intervals, and steps to reach a loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from memdlm_dist.errors import UserError


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with Student's t interval.

    Attributes:
        mean: mean over the pairs.
        half_width: half the width of the interval; None for a single pair.
        pairs: number of pairs.
    """

    mean: float
    half_width: float | None
    pairs: int

    def text(self, digits: int) -> str:
        """Return mean and interval, such as "+0.012 (+0.003, +0.021)", or only the mean of a single pair."""
        if self.half_width is None:
            return f"{self.mean:+.{digits}f}"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.{digits}f} ({low:+.{digits}f}, {high:+.{digits}f})"


def difference(values: Mapping[int, float], reference: Mapping[int, float], confidence: float) -> Difference | None:
    """Compare two arms by the seeds that both have; None if there is no such seed.

    Args:
        values: a result of one arm by seed.
        reference: the same result of the arm that it is compared with.
        confidence: confidence of the interval.
    """
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not differences:
        return None
    n = len(differences)
    half_width = _t_quantile(confidence, n - 1) * stdev(differences) / n**0.5 if n > 1 else None
    return Difference(mean(differences), half_width, n)


def _t_quantile(confidence: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution for a two-sided interval."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError(
            "Confidence intervals need scipy; install the package's [eval] extra (pip install -e '.[eval]')."
        ) from None
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def first_step_below(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """Return the step at which a loss first reaches `target`, interpolated linearly; None if it never does."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None
