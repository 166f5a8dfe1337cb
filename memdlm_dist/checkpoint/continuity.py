"""Comparison of a checkpoint with the run that resumes from it: data, noise, tokenizer and experiment settings.

The number of ranks and the parallel layout may differ, because the sample order and the noise do not depend on them.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from memdlm_dist.errors import UserError, require

logger = logging.getLogger()

# Format of checkpoints and their run.json, raised when older versions cannot read them. No number means format 1.
FORMAT = 1

DATA, TOKENIZER, BATCH = "data.train", "model.hf_assets_path", "training.global_batch_size"
# Configuration keys of a run's identity; `checkpoint.accept_changes` names those that may change.
IDENTITY_KEYS = (
    BATCH, "debug.seed", DATA, "data.shuffle", "data.shuffle_seed", "data.num_canonical_nodes",
    TOKENIZER, "data.group_by_length",
)  # fmt: skip


def identity(
    global_batch_size: int,
    seed: int,
    fingerprint: str,
    shuffle: bool,
    shuffle_seed: int,
    num_canonical_nodes: int,
    tokenizer: str,
    group_by_length: bool,
) -> dict[str, Any]:
    """Return the identity of a run: the values, by configuration key, that must not change when it is resumed.

    Args:
        global_batch_size: rows per optimizer step.
        fingerprint: hash of the indices of all training shards and of the proportions.
        tokenizer: the tokenizer's fingerprint.
    """
    values = (global_batch_size, seed, fingerprint, shuffle, shuffle_seed, num_canonical_nodes, tokenizer)
    return dict(zip(IDENTITY_KEYS, (*values, group_by_length), strict=True))


def check_format(checkpoint: str, run: Mapping[str, Any]) -> None:
    """Check that this version can read a checkpoint's format.

    Args:
        checkpoint: path or URL of the checkpoint.
        run: content of run.json; empty if the file does not exist.

    Raises:
        UserError: if run.json is damaged, or its format is newer than `FORMAT`.
    """
    found_format = run.get("format", 1)
    require(
        isinstance(found_format, int),
        f"{checkpoint}/run.json is damaged (its format is {found_format!r}); restore the file.",
    )
    require(
        found_format <= FORMAT,
        f"The checkpoint {checkpoint} has format {found_format}, and this version reads up to {FORMAT}; use the "
        "version of memdlm_dist that saved it, or a later one.",
    )


def check(
    checkpoint: str,
    run: Mapping[str, Any],
    current: Mapping[str, Any],
    experiment: Mapping[str, Any],
    accepted: Collection[str],
) -> bool:
    """Compare a checkpoint with this run, and return whether the data continue at the saved position.

    If not, a change of the data or their order was accepted, and the run continues with the next epoch. Changed
    experiment settings are only warned of.

    Args:
        checkpoint: path or URL of the checkpoint.
        run: content of run.json; empty if the file does not exist.
        current: this run's identity.
        experiment: this run's other settings that affect the results, by configuration key.
        accepted: identity keys that may differ.

    Raises:
        UserError: naming each difference that is not accepted.
    """
    saved, saved_experiment = (_run_section(checkpoint, run, name) for name in ("identity", "experiment"))
    if not saved:
        logger.warning(
            f"The checkpoint {checkpoint} has no identity in run.json, so this run's data are not compared with it."
        )
        return True
    changed = [key for key in IDENTITY_KEYS if key in saved and saved[key] != current[key]]
    refused = [key for key in changed if key not in accepted]
    if refused:
        differences = ", ".join(f"{_label(key)} {saved[key]} (now {current[key]})" for key in refused)
        raise UserError(
            f"The checkpoint {checkpoint} was made with {differences}, so this run would not continue it; undo the "
            f"change, or accept it with --checkpoint.accept_changes {','.join(refused)}."
        )
    for key in changed:
        logger.warning(f"Accepted: the checkpoint was made with {_label(key)} {saved[key]}, now {current[key]}.")
    if differences := ", ".join(
        f"{key} = {saved_experiment[key]} (now {value})"
        for key, value in experiment.items()
        if saved_experiment.get(key, value) != value
    ):
        logger.warning(f"The checkpoint {checkpoint} was made with {differences}; the run goes on with the change.")
    # The grouped order of an epoch depends on the global batch size.
    regrouped = BATCH in changed and current["data.group_by_length"]
    return not regrouped and not any(key.startswith("data.") for key in changed)


def _run_section(checkpoint: str, run: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = run.get(name, {})
    if not isinstance(section, dict):
        raise UserError(
            f"{checkpoint}/run.json is damaged ({name} is {type(section).__name__}, not an object); restore the file, "
            "or remove it to skip the comparison with the saved run."
        )
    return section


def _label(key: str) -> str:
    return f"{key} fingerprint =" if key in (DATA, TOKENIZER) else f"{key} ="
