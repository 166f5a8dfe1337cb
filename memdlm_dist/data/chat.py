"""Chat templates, which render a conversation as the text that an instruction-tuned model expects.

`llada` is LLaDA-8B's template. `tokenizer` is the template in the tokenizer's folder. It is untrusted code, so
`TemplateProcess` renders it in a separate process.
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

# (messages, add_generation_prompt) -> text, with the arguments of Hugging Face's `apply_chat_template`.
ChatTemplate = Callable[[Sequence[dict[str, str]], bool], str]

_LLADA_START = "<|startoftext|>"
_LLADA_TOKENS = (_LLADA_START, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat_template(name: str, tokenizer: DiffusionTokenizer) -> ChatTemplate:
    """Return the template `name`, one of `TEMPLATES`.

    Raises:
        UserError: if the tokenizer lacks the template or its special tokens.
    """
    if name == "llada":
        missing = [token for token in _LLADA_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"The tokenizer in {tokenizer.tokenizer_path} lacks {missing[0]}, which the chat template llada needs; "
                "use LLaDA's own tokenizer, or another chat template."
            )
        return _llada
    return _tokenizer_template(tokenizer)


def _llada(messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
    turns = [f"{_llada_header(message['role'])}{message['content']}<|eot_id|>" for message in messages]
    return _LLADA_START + "".join(turns) + (_llada_header("assistant") if add_generation_prompt else "")


def _llada_header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _tokenizer_template(tokenizer: DiffusionTokenizer) -> ChatTemplate:
    config = tokenizer.config or {}
    source = config.get("chat_template")
    file = Path(tokenizer.tokenizer_path) / "chat_template.jinja"
    if source is None and file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The chat template {file} cannot be read ({one_line(error)}); restore the file.") from None
    if not isinstance(source, str):
        raise UserError(
            f"The tokenizer in {tokenizer.tokenizer_path} has no chat template (tokenizer_config.json, "
            "chat_template.jinja); choose another chat template, or none."
        )
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    try:
        template = TemplateProcess(source, special, MAX_ROW)
    except jinja2.TemplateError as error:
        problem = f"cannot be read ({one_line(error)}); choose another chat template, or none"
        raise UserError(f"The chat template of {tokenizer.tokenizer_path} {problem}.") from None
    return lambda messages, add_generation_prompt: template.render(
        messages=list(messages), add_generation_prompt=add_generation_prompt
    )


def prompt(template: ChatTemplate, text: str) -> str:
    """Render `text` as a user's turn, followed by the header of the assistant's turn.

    Raises:
        UserError: if the template raises an error.
    """
    try:
        return template([{"role": "user", "content": text}], True)
    except jinja2.TemplateError as error:
        raise UserError(
            f"The chat template refuses the prompt ({one_line(error)}); choose another chat template, or none."
        ) from None


def segments(template: ChatTemplate, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render a conversation as (text, is response) pairs.

    A response is the text that an assistant's turn adds to the rendered conversation.

    Raises:
        ValueError: if the template raises an error, or renders earlier turns differently once another turn follows.
    """
    pairs: list[tuple[str, bool]] = []
    rendered = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = template(messages[:number], True), template(messages[: number + 1], False)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation ({one_line(error)})") from None
        if not before.startswith(rendered) or not after.startswith(before):
            raise ValueError("the chat template rewrites earlier turns when another turn follows")
        pairs += [(before[len(rendered) :], False), (after[len(before) :], True)]
        rendered = after
    return pairs
