"""Check that a checkpoint continues this very run: what decides about the sequence of batches and their noise.

The number of ranks and their layout are not among it: the order of the samples and their noise depend on neither.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from memdlm_dist.errors import UserError

logger = logging.getLogger()

DATA = "data.train"
# What a configuration may let change (`checkpoint.accept_changes`).
KEYS = (
    "training.global_batch_size", "debug.seed", DATA, "data.shuffle", "data.shuffle_seed", "data.num_canonical_nodes",
)  # fmt: skip


def identity(
    global_batch_size: int, seed: int, fingerprint: str, shuffle: bool, shuffle_seed: int, num_canonical_nodes: int
) -> dict[str, Any]:
    """Return what must not change between two parts of one run, by configuration key.

    Args:
        global_batch_size: sequences per optimizer step.
        fingerprint: of the indices of all training shards and of their proportions.
    """
    values = (global_batch_size, seed, fingerprint, shuffle, shuffle_seed, num_canonical_nodes)
    return dict(zip(KEYS, values, strict=True))


def check(checkpoint: str, saved: Mapping[str, Any], ours: Mapping[str, Any], accepted: Collection[str]) -> bool:
    """Return whether the data go on where they stopped; if not, the next epoch was accepted.

    Args:
        checkpoint: its path or URL.
        saved: the identity that was written down with it; empty if none was.
        ours: this run's.
        accepted: keys that may differ.

    Raises:
        UserError: naming each difference that is not accepted.
    """
    if not saved:
        logger.warning(f"The checkpoint {checkpoint} does not say which data it is of: that is not checked.")
        return True
    changed = [key for key in KEYS if key in saved and saved[key] != ours[key]]
    refused = [key for key in changed if key not in accepted]
    if refused:
        differences = ", ".join(f"{_label(key)} {saved[key]} (now {ours[key]})" for key in refused)
        raise UserError(
            f"The checkpoint {checkpoint} was made with {differences}: this run would not continue it; set it back, or "
            f"accept the change with --checkpoint.accept_changes {','.join(refused)}."
        )
    for key in changed:
        logger.warning(f"Accepted: the checkpoint was made with {_label(key)} {saved[key]}, now {ours[key]}.")
    return not any(key.startswith("data.") for key in changed)


def _label(key: str) -> str:
    return "data.train of fingerprint" if key == DATA else f"{key} ="
