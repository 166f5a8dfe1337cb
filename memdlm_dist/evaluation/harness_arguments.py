"""Model arguments as the lm-evaluation-harness parses them: values of unknown type."""

from dataclasses import fields, is_dataclass
from typing import Any

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.errors import UserError


def as_number(name: str, value: Any) -> float:
    """Return a model argument as a number.

    Raises:
        UserError: if it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"The model argument {name} must be a number, not '{value}'.") from None


def as_integer(name: str, value: Any) -> int:
    """Return a model argument as an integer.

    Raises:
        UserError: if it is none.
    """
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"The model argument {name} must be an integer, not '{value}'.") from None


def as_token_ids(value: str | int) -> tuple[int, ...]:
    """Parse token ids that are joined by colons; the harness turns a single id into an integer.

    Raises:
        UserError: if an id is not an integer of at least 0.
    """
    ids = str(value).split(":") if value != "" else []
    if wrong := [item for item in ids if not (item.isascii() and item.isdigit())]:
        raise UserError(
            f"The model argument suppress_tokens has token ids joined by colons, such as 5:6, but one is '{wrong[0]}'."
        )
    return tuple(map(int, ids))


def as_flags(key: str, value: Any) -> list[str]:
    """Return the command-line flags that set a key of the configuration; a boolean key takes none but its own name."""
    section, _, name = key.rpartition(".")
    if str(value) in ("True", "False") and _type(key) is bool:
        return [f"--{key}" if str(value) == "True" else f"--{section}.no_{name}"]
    return [f"--{key}", str(value)]


def _type(key: str) -> Any:
    """Return the type of a key of the configuration; None if there is no such key."""
    kind: Any = JobConfig
    for name in key.split("."):
        kind = {field.name: field.type for field in fields(kind)}.get(name) if is_dataclass(kind) else None
    return kind
