"""Rows of a corpus as tokens: documents, and prompts with responses to fine-tune on."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Format = Literal["text", "prompt_response", "alpaca", "messages"]
MAX_ROW = 64 << 20  # bytes of a row as it is stored, and characters of a text in it


@dataclass(frozen=True)
class Document:
    """Tokens that belong together, of any number; only `maskable` ones are ever masked and scored."""

    tokens: list[int]
    maskable: list[bool]

    def __getitem__(self, part: slice) -> "Document":
        return Document(self.tokens[part], self.maskable[part])


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence of L tokens: a row of a batch.

    Attributes:
        documents: numbers of tokens of the documents that are kept apart in it, in turn; what is left behind them is
            fill. Empty if it is one whole.
    """

    tokens_L: NDArray[np.int64]
    maskable_L: NDArray[np.bool_]
    documents: tuple[int, ...] = ()


class BadRow(ValueError):
    """A row lacks a field or has one of the wrong kind."""


@dataclass(frozen=True)
class Fields:
    """The names under which a row keeps its parts."""

    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"


def detect_format(values: dict[str, Any], fields: Fields) -> Format | None:
    """The format of a row by its keys; None if it has none of the known ones."""
    if "messages" in values:
        return "messages"
    if "instruction" in values and "output" in values:
        return "alpaca"
    if fields.prompt in values and fields.response in values:
        return "prompt_response"
    return "text" if fields.text in values else None


def _string(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise BadRow(f"field {key!r} is " + ("missing" if key not in values else f"{type(value).__name__}, not text"))
    check_text(value, f"field {key!r}")
    return value


def check_text(text: str, name: str) -> None:
    """Check that a text can be encoded.

    Raises:
        BadRow: if it is too long, or holds half a surrogate pair.
    """
    if len(text) > MAX_ROW:
        raise BadRow(f"{name} is longer than {MAX_ROW:,} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} is no valid Unicode ({error.reason} at character {error.start})") from None


def document(values: dict[str, Any], fields: Fields) -> str:
    """The text of a pre-training row.

    Raises:
        BadRow: naming the field.
    """
    text = _string(values, fields.text)
    if not text.strip():
        raise BadRow(f"field {fields.text!r} is empty")
    return text


def segments(values: dict[str, Any], form: Format, fields: Fields) -> list[tuple[str, bool]]:
    """A fine-tuning row as (text, is response) pairs; every response ends its turn with end-of-text.

    alpaca: the instruction, the input if there is one, and the output, apart by empty lines.
    messages: each turn as `role: content`, apart by empty lines; the assistant's turns are responses.

    Raises:
        BadRow: naming the field.
    """
    if form == "prompt_response":
        parts = [(_string(values, fields.prompt), False), (_string(values, fields.response), True)]
    elif form == "alpaca":
        context = _string(values, "input") if values.get("input") else ""
        prompt = "\n\n".join(filter(None, (_string(values, "instruction"), context)))
        parts = [(prompt + "\n\n", False), (_string(values, "output"), True)]
    else:
        parts = _turns(values.get("messages"))
    if not any(text.strip() for text, is_response in parts if is_response):
        raise BadRow("there is no response to learn from")
    return parts


def conversation(values: dict[str, Any], form: Format, fields: Fields) -> list[dict[str, str]]:
    """A fine-tuning row as messages, for a chat template.

    Raises:
        BadRow: naming the field.
    """
    if form == "messages":
        _turns(values.get("messages"))  # checks them
        return [{"role": m["role"], "content": m["content"]} for m in values["messages"]]
    (prompt, _), (response, _) = segments(values, form, fields)
    return [{"role": "user", "content": prompt.rstrip("\n")}, {"role": "assistant", "content": response}]


def _turns(messages: Any) -> list[tuple[str, bool]]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is not a non-empty list")
    parts: list[tuple[str, bool]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"messages[{number}] is {type(message).__name__}, not an object")
        role, content = _string(message, "role"), _string(message, "content")
        if role == "assistant":
            parts += [(f"{role}: ", False), (content, True)]
        else:
            parts.append((f"{role}: {content}\n\n", False))
    return parts


def fine_tuning(
    parts: list[tuple[list[int], bool]],
    length: int,
    eos_id: int,
    overlong: Literal["drop", "truncate"],
    every_turn: bool = True,
) -> tuple[Document | None, bool]:
    """One fine-tuning row as at most `length` tokens. The prompt is never masked, the responses are.

    Args:
        every_turn: end-of-text ends every response; otherwise, where a chat template ends them, the row alone.

    Returns:
        The tokens, or None for a row that is dropped (too long, or left without a response by
        truncation), and whether the row was too long.
    """
    tokens: list[int] = []
    maskable: list[bool] = []
    for number, (part, is_response) in enumerate(parts, start=1):
        part = [*part, eos_id] if is_response and (every_turn or number == len(parts)) else part
        tokens += part
        maskable += [is_response] * len(part)
    too_long = len(tokens) > length
    if too_long and (overlong == "drop" or not any(maskable[:length])):
        return None, True
    return Document(tokens, maskable)[:length], too_long


def padded(document: Document, length: int, eos_id: int) -> TrainingSequence:
    """A row with one document, padded with end-of-text that, as in the paper's recipe, is masked and scored too."""
    missing = length - len(document.tokens)
    return TrainingSequence(
        np.array(document.tokens + [eos_id] * missing, dtype=np.int64),
        np.array(document.maskable + [True] * missing, dtype=np.bool_),
    )
