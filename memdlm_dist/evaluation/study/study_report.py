"""Tables and plots of a study."""

from pathlib import Path

from memdlm_dist.evaluation.study.results import StudyResults


def tables(study: StudyResults, confidence: float) -> str:
    """Return the tables."""
    raise NotImplementedError


def plots(study: StudyResults, folder: Path) -> list[Path]:
    """Draw the plots."""
    raise NotImplementedError
