"""Files of many prompts: JSON lines with the prompts, JSON lines with their responses."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line

_KEYS = ("prompt", "new_tokens", "id")


class Prompt(NamedTuple):
    """Line of a file of prompts.

    Attributes:
        label: line number and file, for messages.
        text: the prompt.
        new_tokens: [MASK]s to append; None if the line does not say.
        id: name of the prompt in the output; the line's number if the line has none.
    """

    label: str
    text: str
    new_tokens: int | None
    id: str | int


def read(path: Path) -> list[Prompt]:
    """Read the prompts of a file; blank lines are skipped.

    Raises:
        UserError: if the file cannot be read or has no prompts, or names the first bad line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"The prompts {path} cannot be read: {one_line(error)}; correct --prompts.") from None
    prompts = [_prompt(f"Line {i} of {path}", i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompts (it is empty); write one JSON object per line.")
    return prompts


def _prompt(label: str, number: int, line: bytes) -> Prompt:
    """Parse a line.

    Raises:
        UserError: if the line is no prompt.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label} is not JSON ({one_line(error)}); correct the line.") from None
    if not isinstance(row, dict):
        raise UserError(f'{label} is not a JSON object; write {{"prompt": "..."}}.')
    if unknown := [key for key in row if key not in _KEYS]:
        raise UserError(f"{label} has the unknown key {unknown[0]!a} (known: {', '.join(_KEYS)}); remove it.")
    text, new_tokens, name = row.get("prompt"), row.get("new_tokens"), row.get("id", number)
    if not isinstance(text, str) or not _is_unicode(text):
        problem = "is not valid Unicode" if isinstance(text, str) else "is missing or not a string"
        raise UserError(f"{label} has no prompt that can be read (prompt {problem}); correct it.")
    if new_tokens is not None and (type(new_tokens) is not int or new_tokens < 0):
        raise UserError(f"{label} has new_tokens = {new_tokens!r}, which is not an integer of at least 0; correct it.")
    if type(name) is not int and not isinstance(name, str):
        raise UserError(f"{label} has id = {name!r}, which is neither a string nor an integer; correct it.")
    return Prompt(label, text, new_tokens, name)


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which JSON can write but UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeError:
        return False
    return True


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines atomically.

    Raises:
        UserError: if the file cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"The output {path} cannot be written: {one_line(error)}; choose another --output.") from None
