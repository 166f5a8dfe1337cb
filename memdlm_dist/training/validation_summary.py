"""Table of a run's first and last validation, printed when the run ends."""

from memdlm_dist.training.validation_history import LOSSES, history, path_in


def summary_table(dump_folder: str) -> str | None:
    """Return the first and the last validation of a run as a table; None without a validation."""
    path = path_in(dump_folder)
    rows = history(path) if path.is_file() else []
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    lines = ["held-out loss (nats per token)    memory off    memory on"]
    for label, row in (("start", first), ("end", last)):
        values = "".join(f"{row[name]:>13.4f}" if name in row else f"{'-':>13}" for name in LOSSES)
        lines.append(f"  {label:<5} (step {row['step']:>6})            {values}")
    return "\n".join(lines)
