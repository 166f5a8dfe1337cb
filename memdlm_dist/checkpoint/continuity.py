"""Check that a checkpoint continues this very run: its data, its noise, its tokenizer; and warn of what else changed.

The number of ranks and their layout are not among it: the order of the samples and their noise depend on neither.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from memdlm_dist.errors import UserError, require

logger = logging.getLogger()

# Format of checkpoints and their run.json: raised when an older version could not read them. Without a number it is 1.
FORMAT = 1

DATA, TOKENIZER = "data.train", "model.hf_assets_path"
# What a configuration may let change (`checkpoint.accept_changes`).
KEYS = (
    "training.global_batch_size", "debug.seed", DATA, "data.shuffle", "data.shuffle_seed", "data.num_canonical_nodes",
    TOKENIZER,
)  # fmt: skip


def identity(
    global_batch_size: int,
    seed: int,
    fingerprint: str,
    shuffle: bool,
    shuffle_seed: int,
    num_canonical_nodes: int,
    tokenizer: str,
) -> dict[str, Any]:
    """Return what must not change between two parts of one run, by configuration key.

    Args:
        global_batch_size: sequences per optimizer step.
        fingerprint: of the indices of all training shards and of their proportions.
        tokenizer: its fingerprint.
    """
    values = (global_batch_size, seed, fingerprint, shuffle, shuffle_seed, num_canonical_nodes, tokenizer)
    return dict(zip(KEYS, values, strict=True))


def check_format(checkpoint: str, run: Mapping[str, Any]) -> None:
    """Check that this version reads a checkpoint.

    Args:
        run: its run.json; empty if it has none.

    Raises:
        UserError: if it is damaged, or of a later version.
    """
    found = run.get("format", 1)
    require(isinstance(found, int), f"{checkpoint}/run.json is damaged (its format is {found!r}); restore the file.")
    require(
        found <= FORMAT,
        f"The checkpoint {checkpoint} has format {found}, and this version reads up to {FORMAT}; use the version of "
        "memdlm_dist that saved it, or a later one.",
    )


def check(
    checkpoint: str,
    run: Mapping[str, Any],
    ours: Mapping[str, Any],
    experiment: Mapping[str, Any],
    accepted: Collection[str],
) -> bool:
    """Return whether the data go on where they stopped; if not, the next epoch was accepted.

    Warns of changes of the experiment, which are continued.

    Args:
        checkpoint: its path or URL.
        run: its run.json; empty if it has none.
        ours: this run's identity.
        experiment: the settings that decide about the outcome besides, by configuration key.
        accepted: keys of the identity that may differ.

    Raises:
        UserError: naming each difference that is not accepted.
    """
    saved, before = (_section(checkpoint, run, name) for name in ("identity", "experiment"))
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
    if differences := ", ".join(
        f"{key} = {before[key]} (now {value})" for key, value in experiment.items() if before.get(key, value) != value
    ):
        logger.warning(f"The checkpoint {checkpoint} was made with {differences}; the run goes on with the change.")
    return not any(key.startswith("data.") for key in changed)


def _section(checkpoint: str, run: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = run.get(name, {})
    if not isinstance(section, dict):
        raise UserError(
            f"{checkpoint}/run.json is damaged ({name} is {type(section).__name__}, not an object); restore the file, "
            "or remove it to go on without the check of what changed."
        )
    return section


def _label(key: str) -> str:
    return f"{key} of fingerprint" if key in (DATA, TOKENIZER) else f"{key} ="
