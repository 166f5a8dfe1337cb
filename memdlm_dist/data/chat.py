"""Chat templates: how a conversation is written as text for a model that was tuned on conversations.

`llada` is LLaDA-8B's own; `tokenizer` takes the template that comes with a tokenizer, rendered by `TemplateProcess`,
since it is text that somebody else wrote.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from memdlm_dist.data.sequences import MAX_ROW
from memdlm_dist.data.template_process import TemplateProcess
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line

TEMPLATES = ("llada", "tokenizer")

# (messages, whether the assistant's turn is to come) -> text.
ChatTemplate = Callable[[Sequence[dict[str, str]], bool], str]

_LLADA_START = "<|startoftext|>"
_LLADA_TOKENS = (_LLADA_START, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat_template(name: str, tokenizer: DiffusionTokenizer) -> ChatTemplate:
    """Return a template by name, one of `TEMPLATES`.

    Raises:
        UserError: if the tokenizer lacks the template or its special tokens.
    """
    if name == "llada":
        lacking = [token for token in _LLADA_TOKENS if tokenizer.token_to_id(token) is None]
        if lacking:
            raise UserError(
                f"The tokenizer in {tokenizer.tokenizer_path} lacks {lacking[0]}, which the chat template llada needs; "
                "use LLaDA's own tokenizer, or another template."
            )
        return _llada
    return _of_tokenizer(tokenizer)


def _llada(messages: Sequence[dict[str, str]], open_end: bool) -> str:
    turns = [f"{_llada_header(message['role'])}{message['content']}<|eot_id|>" for message in messages]
    return _LLADA_START + "".join(turns) + (_llada_header("assistant") if open_end else "")


def _llada_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _of_tokenizer(tokenizer: DiffusionTokenizer) -> ChatTemplate:
    config = tokenizer.config or {}
    source = config.get("chat_template")
    file = Path(tokenizer.tokenizer_path) / "chat_template.jinja"
    if source is None and file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The chat template {file} cannot be read: {one_line(error)}.") from None
    if not isinstance(source, str):
        raise UserError(
            f"The tokenizer in {tokenizer.tokenizer_path} has no chat template (tokenizer_config.json, "
            "chat_template.jinja); choose another, or none."
        )
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    try:
        template = TemplateProcess(source, special, MAX_ROW)
    except jinja2.TemplateError as error:
        problem = f"cannot be read ({one_line(error)}); choose another, or none"
        raise UserError(f"The chat template of {tokenizer.tokenizer_path} {problem}.") from None
    return lambda messages, open_end: template.render(messages=list(messages), add_generation_prompt=open_end)


def prompt(template: ChatTemplate, text: str) -> str:
    """Render a user's turn, with the assistant's to come.

    Raises:
        UserError: if the template cannot render it.
    """
    try:
        return template([{"role": "user", "content": text}], True)
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template refuses the prompt ({one_line(error)}); choose another, or none.") from None


def segments(template: ChatTemplate, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render a conversation as (text, is response) pairs: a response is what an assistant's turn adds to the text.

    Raises:
        ValueError: if the template cannot render it, or writes a turn otherwise once another follows.
    """
    parts: list[tuple[str, bool]] = []
    written = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = template(messages[:number], True), template(messages[: number + 1], False)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it ({one_line(error)})") from None
        if not before.startswith(written) or not after.startswith(before):
            raise ValueError("the chat template does not write the turns one behind the other")
        parts += [(before[len(written) :], False), (after[len(before) :], True)]
        written = after
    return parts
