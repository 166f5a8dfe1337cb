"""Chat templates, which render a conversation as the text that an instruction-tuned model expects.

`llada` is LLaDA-8B's template and `llada2` that of LLaDA2.0 and 2.1, `tokenizer` is the template in the tokenizer's
folder, and PATH.jinja a user's own. The last two are untrusted code, so `TemplateProcess` renders them in a separate
process.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from memdlm_dist.data.sequences import MAX_ROW, BadRow
from memdlm_dist.data.template_process import Rendering, TemplateProcess
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line

_SUFFIX = ".jinja"

_PROBE = "\ue000"  # private-use character, which no template writes


@dataclass(frozen=True)
class BuiltIn:
    """Format of a built-in template: `start`, then a header, the content and `end` for each turn.

    Attributes:
        model: published model whose tokenizer has the tokens.
        start: text before the first turn.
        header: format string of a turn's header, which takes the role's name.
        end: special token that ends a turn.
        tokens: special tokens that the format cannot do without.
        roles: the format's names of roles, which has no others; None to keep the names of all roles.
    """

    model: str
    start: str
    header: str
    end: str
    tokens: tuple[str, ...]
    roles: Mapping[str, str] | None = None

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> Rendering:
        """Render a conversation, followed by the header of the assistant's turn if `add_generation_prompt`.

        Raises:
            jinja2.TemplateError: if the format does not have a role, as a template of a tokenizer does.
        """
        turns = [f"{self._header(message['role'])}{message['content']}{self.end}" for message in messages]
        return Rendering(self.start + "".join(turns) + (self._header("assistant") if add_generation_prompt else ""), [])

    def _header(self, role: str) -> str:
        if self.roles is not None and role not in self.roles:
            raise jinja2.TemplateError(f"it has no role {role}, only {', '.join(self.roles)}")
        return self.header.format(role if self.roles is None else self.roles[role])


_BUILT_IN = {
    "llada": BuiltIn(
        model="LLaDA-8B",
        start="<|startoftext|>",
        header="<|start_header_id|>{}<|end_header_id|>\n\n",
        end="<|eot_id|>",
        tokens=("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llada2": BuiltIn(
        model="LLaDA2",
        start="",
        header="<role>{}</role>",
        end="<|role_end|>",
        tokens=("<|role_end|>",),
        roles={"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"},
    ),
}
TEMPLATES = (*_BUILT_IN, "tokenizer")


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template.

    Attributes:
        render: (messages, add_generation_prompt) -> rendering.
        fingerprint: hash of the template's source and variables; its name if it is built in.
        has_generation_blocks: the rendering's spans are the responses.
    """

    render: Callable[[Sequence[dict[str, str]], bool], Rendering]
    fingerprint: str
    has_generation_blocks: bool = False

    def __call__(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """Return the text of a conversation, with the arguments of Hugging Face's `apply_chat_template`."""
        return self.render(messages, add_generation_prompt).text


def name_or_path(text: str) -> str:
    """Parse the name of a chat template or the path of its file (argparse type).

    Raises:
        argparse.ArgumentTypeError: if there is no such template.
    """
    if text in TEMPLATES:
        return text
    if not text.endswith(_SUFFIX):
        raise argparse.ArgumentTypeError(f"'{text}' is neither {' nor '.join(TEMPLATES)} nor a file *{_SUFFIX}")
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def chat_template(name: str, tokenizer: DiffusionTokenizer) -> ChatTemplate:
    """Return a template.

    Args:
        name: one of `TEMPLATES`, or the path of a Jinja file.

    Raises:
        UserError: if the template cannot be read, or the tokenizer lacks it or its special tokens.
    """
    if built_in := _BUILT_IN.get(name):
        missing = [token for token in built_in.tokens if tokenizer.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"The tokenizer in {tokenizer.tokenizer_path} lacks {missing[0]}, which the chat template {name} "
                f"needs; use {built_in.model}'s own tokenizer, or another chat template."
            )
        return ChatTemplate(built_in.render, name)
    if name != "tokenizer":
        return _jinja_template(_read(Path(name)), f"The chat template {name}", tokenizer)
    source = _tokenizer_template(tokenizer)
    return _jinja_template(source, f"The chat template of {tokenizer.tokenizer_path}", tokenizer)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The chat template {file} cannot be read ({one_line(error)}); restore the file.") from None


def _tokenizer_template(tokenizer: DiffusionTokenizer) -> str:
    """Return the source of a tokenizer's template; its file takes precedence, as in Hugging Face's transformers."""
    file = Path(tokenizer.tokenizer_path) / "chat_template.jinja"
    if file.is_file():
        return _read(file)
    source: Any = (tokenizer.config or {}).get("chat_template")
    if isinstance(source, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
        if named and source is None:
            raise UserError(
                f"The tokenizer in {tokenizer.tokenizer_path} has several chat templates "
                f"({', '.join(map(str, named))}) and none named default; save one as a file *{_SUFFIX} and choose it."
            )
    if not isinstance(source, str):
        raise UserError(
            f"The tokenizer in {tokenizer.tokenizer_path} has no chat template (tokenizer_config.json, "
            "chat_template.jinja); choose another chat template, or none."
        )
    return source


def _jinja_template(source: str, label: str, tokenizer: DiffusionTokenizer) -> ChatTemplate:
    special = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in (tokenizer.config or {}).items()
        if key.endswith("_token")
    }
    strings = {key: value for key, value in special.items() if isinstance(value, str)}  # null is undefined
    try:
        process = TemplateProcess(source, strings, MAX_ROW)
    except jinja2.TemplateError as error:
        problem = f"cannot be read ({one_line(error)}); choose another chat template, or none"
        raise UserError(f"{label} {problem}.") from None
    return ChatTemplate(
        lambda messages, prompt: process.render(messages=list(messages), add_generation_prompt=prompt),
        hashlib.sha256(json.dumps([source, strings], sort_keys=True).encode()).hexdigest()[:16],
        process.has_generation_blocks,
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


def end_of_turn(template: ChatTemplate, tokenizer: DiffusionTokenizer) -> int | None:
    """Return the id of the special token that ends an assistant's turn; None if the template writes none."""
    try:
        text = template([{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}], False)
    except jinja2.TemplateError:
        return None
    _, found, rest = text.rpartition(_PROBE)
    ids = tokenizer.encode_plain([rest.lstrip()])[0] if found else []
    return ids[0] if ids and ids[0] in tokenizer.special_ids else None


def segments(template: ChatTemplate, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render a conversation as (text, is response) pairs, up to its last response.

    With generation blocks the conversation is rendered once, and the blocks are the responses. Otherwise a response is
    the text that an assistant's turn adds to the rendered conversation.

    Raises:
        BadRow: if the template raises an error or renders no response. Without generation blocks also if it renders
            earlier turns differently once another turn follows, or begins a response in another way than its generation
            prompt.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        pairs = (_by_generation_blocks if template.has_generation_blocks else _by_turns)(template, messages, turns)
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses the conversation ({one_line(error)})") from None
    if not any(text for text, is_response in pairs if is_response):
        raise BadRow("the chat template renders no response")
    return pairs


def _by_generation_blocks(
    template: ChatTemplate, messages: Sequence[dict[str, str]], turns: list[int]
) -> list[tuple[str, bool]]:
    # As in `_by_turns`, what follows the last response is left out: at inference it would be unknown.
    text, spans = template.render(messages[: turns[-1] + 1] if turns else messages, False)
    pairs: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        pairs += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [(text, is_response) for text, is_response in pairs if text]


def _by_turns(template: ChatTemplate, messages: Sequence[dict[str, str]], turns: list[int]) -> list[tuple[str, bool]]:
    pairs: list[tuple[str, bool]] = []
    rendered = ""
    for number in turns:
        before, after = template(messages[:number], True), template(messages[: number + 1], False)
        if not before.startswith(rendered) or not after.startswith(before):
            # The generation prompt can differ from the beginning of the response, for example in `<think>`.
            only_prompt = before.startswith(rendered) and after.startswith(template(messages[:number], False))
            problem = (
                "begins a response in another way than its generation prompt"
                if only_prompt
                else "rewrites earlier turns when another turn follows"
            )
            raise BadRow(f"the chat template {problem} (choose a template that marks responses by {{% generation %}})")
        pairs += [(before[len(rendered) :], False), (after[len(before) :], True)]
        rendered = after
    return pairs
