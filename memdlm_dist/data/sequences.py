"""Conversion of corpus rows: documents for pre-training, prompts and responses for fine-tuning."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Format = Literal["text", "prompt_response", "alpaca", "messages", "sharegpt"]
MAX_ROW = 64 << 20  # bytes of a stored corpus row, and characters of a text in it
_SHAREGPT_ROLES = {  # value of `from` -> role
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_TOOL_CALLS = ("tool_calls", "function_call")  # keys of a turn


@dataclass(frozen=True)
class Document:
    """Tokens of a document of any length, and a flag for each: only maskable tokens are ever masked and scored."""

    tokens: NDArray[np.uint32]
    maskable: NDArray[np.bool_]

    def __getitem__(self, index: slice) -> "Document":
        return Document(self.tokens[index], self.maskable[index])


@dataclass(frozen=True)
class TrainingSequence:
    """One training sequence of L tokens, a row of a batch.

    Attributes:
        documents: lengths of the documents in a packed row, in order; the tokens after them are padding. Empty if the
            row is not packed.
        content: number of tokens before the padding of a fine-tuning row; None if the row has no such padding.
    """

    tokens_L: NDArray[np.int64]
    maskable_L: NDArray[np.bool_]
    documents: tuple[int, ...] = ()
    content: int | None = None


class BadRow(ValueError):
    """Error of a corpus row that cannot be used, such as a missing field or a field of the wrong type."""


@dataclass(frozen=True)
class Fields:
    """Field names of a corpus row."""

    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"


def detect_format(values: dict[str, Any], fields: Fields) -> Format | None:
    """Return the format of a corpus row according to its keys; None if they match no known format."""
    if "messages" in values:
        return "messages"
    if "conversations" in values:
        return "sharegpt"
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

    Args:
        name: of the text, for the error message.

    Raises:
        BadRow: if the text is too long, or contains half a surrogate pair.
    """
    if len(text) > MAX_ROW:
        raise BadRow(f"{name} is longer than {MAX_ROW:,} characters")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} is not valid Unicode ({error.reason} at character {error.start})") from None


def document(values: dict[str, Any], fields: Fields) -> str:
    """Return the text of a pre-training row.

    Raises:
        BadRow: naming the field.
    """
    text = _string(values, fields.text)
    if not text.strip():
        raise BadRow(f"field {fields.text!r} is empty")
    return text


def segments(values: dict[str, Any], row_format: Format, fields: Fields) -> list[tuple[str, bool]]:
    """Split a fine-tuning row into (text, is response) pairs.

    alpaca: the instruction, the input if not empty, and the output, separated by empty lines.
    messages, sharegpt: each turn as `role: content`, separated by empty lines; the assistant's turns are responses.

    Raises:
        BadRow: naming the field.
    """
    if row_format == "prompt_response":
        pairs = [(_string(values, fields.prompt), False), (_string(values, fields.response), True)]
    elif row_format == "alpaca":
        context = _string(values, "input") if values.get("input") else ""
        prompt = "\n\n".join(filter(None, (_string(values, "instruction"), context)))
        pairs = [(prompt + "\n\n", False), (_string(values, "output"), True)]
    else:
        pairs = []
        for message in _messages(values, row_format):
            role, content = message["role"], message["content"]
            if role == "assistant":
                pairs += [(f"{role}: ", False), (content, True)]
            else:
                pairs.append((f"{role}: {content}\n\n", False))
    if not any(text.strip() for text, is_response in pairs if is_response):
        raise BadRow("the row has no response to learn from")
    return pairs


def conversation(values: dict[str, Any], row_format: Format, fields: Fields) -> list[dict[str, str]]:
    """Convert a fine-tuning row to messages for a chat template.

    Raises:
        BadRow: naming the field.
    """
    pairs = segments(values, row_format, fields)  # raises BadRow if the row is invalid
    if row_format in ("messages", "sharegpt"):
        return _messages(values, row_format)
    (prompt, _), (response, _) = pairs
    return [{"role": "user", "content": prompt.rstrip("\n")}, {"role": "assistant", "content": response}]


def _messages(values: dict[str, Any], row_format: Format) -> list[dict[str, str]]:
    name = "conversations" if row_format == "sharegpt" else "messages"
    turns = values.get(name)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"field {name!r} is not a non-empty list")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRow(f"{name}[{number}] is {type(turn).__name__}, not an object")
        for key in _TOOL_CALLS:
            if turn.get(key):
                raise BadRow(f"{name}[{number}] has {key} (tool calls are not supported)")
        # Some ShareGPT data sets have turns like those of `messages`.
        is_sharegpt = row_format == "sharegpt" and not ("role" in turn and "from" not in turn)
        messages.append(_sharegpt_message(turn) if is_sharegpt else _message(turn))
    if row_format == "sharegpt" and values.get("system"):
        system = {"role": "system", "content": _string(values, "system")}
        if messages[0]["role"] != "system":
            messages.insert(0, system)
    return messages


def _sharegpt_message(turn: dict[str, Any]) -> dict[str, str]:
    speaker, content = _string(turn, "from"), _string(turn, "value")
    if speaker not in _SHAREGPT_ROLES:
        raise BadRow(f"field 'from' has the unknown role {speaker!r}, not one of {', '.join(_SHAREGPT_ROLES)}")
    return {"role": _SHAREGPT_ROLES[speaker], "content": content}


def _message(turn: dict[str, Any]) -> dict[str, str]:
    role, content = _string(turn, "role"), turn.get("content")
    if not isinstance(content, list):
        return {"role": role, "content": _string(turn, "content")}
    for number, part in enumerate(content):
        if not isinstance(part, dict):
            raise BadRow(f"content[{number}] is {type(part).__name__}, not an object")
        if part.get("type") != "text":
            raise BadRow(f"content[{number}] has the type {part.get('type')!r}; only 'text' is supported")
    text = "".join(_string(part, "text") for part in content)
    check_text(text, "field 'content'")
    return {"role": role, "content": text}


Overlong = Literal["drop", "truncate", "clip-response"]


def fine_tuning_document(
    encoded: list[tuple[NDArray[np.uint32], bool]],
    length: int,
    eos_id: int,
    overlong: Overlong,
    every_turn: bool = True,
) -> tuple[Document | None, bool]:
    """Build a document of at most `length` tokens from a fine-tuning row; only responses are maskable.

    Args:
        encoded: (token ids, is response) pairs.
        overlong: treatment of a row that is too long. "drop" drops it. "truncate" cuts it, and drops it if no response
            is left. "clip-response" also removes a prompt at the cut, so that the document ends in a response.
        every_turn: append end-of-text to every response. If False, append it only at the end of the row, because a chat
            template marks the end of each response.

    Returns:
        The document, and whether the row was too long. The document is None if the row is dropped.
    """
    end = np.array([eos_id], dtype=np.uint32)
    pieces: list[NDArray[np.uint32]] = []
    flags: list[bool] = []
    for number, (ids, is_response) in enumerate(encoded, start=1):
        added = [ids, end] if is_response and (every_turn or number == len(encoded)) else [ids]
        pieces += added
        flags += [is_response] * len(added)
    tokens, maskable = np.concatenate(pieces), np.repeat(np.array(flags), [len(piece) for piece in pieces])
    too_long = len(tokens) > length
    if too_long and (overlong == "drop" or not maskable[:length].any()):
        return None, True
    if too_long and overlong == "clip-response":
        length -= int(maskable[:length][::-1].argmax())
    return Document(tokens, maskable)[:length], too_long


def padded(document: Document, length: int, eos_id: int) -> TrainingSequence:
    """Pad one document to a row with end-of-text, which is maskable and scored, as in the paper's recipe.

    Args:
        length: of the row, see `row_lengths.padded_length`.
    """
    n_padding = length - len(document.tokens)
    return TrainingSequence(
        np.pad(document.tokens.astype(np.int64), (0, n_padding), constant_values=eos_id),
        np.pad(document.maskable, (0, n_padding), constant_values=True),
        content=len(document.tokens),
    )
