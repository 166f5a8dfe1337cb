"""Chat templates in the lm-evaluation-harness: the choice of `--apply_chat_template`, and rendering."""

import argparse
from collections.abc import Sequence

import jinja2

from memdlm_dist.data import chat
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime.rank_0 import one_line

_END = "\ue000 "  # private-use character, which no task uses; the blank shows whether the template trims messages


def template_name(choice: bool | str) -> str:
    """Return a chat template's name or path from the value of `--apply_chat_template`, which is True without a name.

    Raises:
        UserError: if there is no template with this name.
    """
    try:
        return chat.name_or_path("tokenizer" if choice is True else str(choice))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--apply_chat_template names no template ({error}); name one, or none.") from None


def load(choice: bool | str, tokenizer: DiffusionTokenizer) -> chat.ChatTemplate:
    """Return the chat template that `--apply_chat_template` chooses, by default the tokenizer's.

    Raises:
        UserError: if there is no such template, or the tokenizer lacks it or its special tokens.
    """
    return chat.chat_template(template_name(choice), tokenizer)


def render(template: chat.ChatTemplate, messages: Sequence[dict[str, str]], opens_turn: bool) -> str:
    """Render a conversation as a prompt.

    Args:
        opens_turn: end with the header of the assistant's turn; False: end with the last message, the beginning of the
            response. Hugging Face's `apply_chat_template` has `add_generation_prompt` and `continue_final_message`.

    Raises:
        UserError: if the template raises an error, or drops the last message.
    """
    try:
        if opens_turn:
            return template(messages, True)
        *earlier, last = messages
        text, end, rest = template([*earlier, {**last, "content": last["content"] + _END}], False).rpartition(_END[0])
    except jinja2.TemplateError as error:
        raise UserError(
            f"The chat template refuses a conversation of the task ({one_line(error)}); choose another "
            "--apply_chat_template, or none."
        ) from None
    if not end:
        raise UserError(
            "The chat template drops the beginning of the response that the task gives (gen_prefix); choose another "
            "--apply_chat_template, or none."
        )
    return text if rest.startswith(_END[1]) else text.rstrip()
