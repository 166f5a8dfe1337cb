"""Responses to prompts, or their [MASK]s filled in, as text."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.inference import canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_file import Prompt
from memdlm_dist.inference.prompt_memory import AdaptedMemory, MemorySettings
from memdlm_dist.inference.sampler import Decoder
from memdlm_dist.inference.screen import Screen
from memdlm_dist.inference.serving import Request, Served, serve
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.runtime.rank_0 import is_rank_0

MASK = "[MASK]"
_NEW_TOKENS = 64


class _Texts:
    """Prompts and responses of a model as texts.

    Args:
        chat_template: one of `chat.TEMPLATES` or the path of a Jinja file; None for plain prompts.
    """

    def __init__(self, model: TrainedModel, chat_template: str | None):
        self._model = model
        self._template = chat.chat_template(chat_template, model.tokenizer) if chat_template else None
        self._end_of_turn = chat.end_of_turn(self._template, model.tokenizer) if self._template else None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            UserError: if the template rejects it.
        """
        text = text.replace(MASK, self._model.tokenizer.mask_token)
        if self._template:
            text = chat.prompt(self._template, text)
        (prompt,) = self._model.tokenizer.encode_plain([text])
        return prompt

    def answer(
        self,
        text: str,
        prompt: Sequence[int],
        response: Sequence[int],
        memory: MemorySettings | AdaptedMemory | None,
    ) -> dict[str, Any]:
        """Return the texts of a response; with a chat template, it ends before the end of the turn.

        Args:
            text: the prompt as the user wrote it.
            prompt: the prompt's token ids with its [MASK]s filled in.
            response: token ids of the response.
            memory: see `respond`.
        """
        response = canvas.until(response, {self._end_of_turn})
        return {
            "prompt": text,
            "response": self._model.tokenizer.decode(response),
            "text": self._model.tokenizer.decode([*prompt, *response]),
            "memory": "off" if memory is None else "on" if isinstance(memory, MemorySettings) else "loaded",
            "checkpoint": self._model.checkpoint,
            "adapter": self._model.adapter,
            **({"memory_prompt": asdict(memory.prompts[0])} if isinstance(memory, AdaptedMemory) else {}),
        }


def _count_new_tokens(model: TrainedModel, prompt: Sequence[int], new_tokens: int | None) -> int:
    """Return the number of [MASK]s to append to a prompt."""
    if new_tokens is None:
        return 0 if model.mask_id in prompt else _NEW_TOKENS
    return new_tokens


def _warn_if_long(model: TrainedModel, length: int, memory: MemorySettings | AdaptedMemory | None) -> None:
    """Warn if a row is longer than those of the training."""
    if length > model.trained_length and is_rank_0():
        at_once = memory.chunk or length if isinstance(memory, MemorySettings) else 0
        hint = "; --memory-chunk lets the inner loop read it in pieces" if at_once > model.trained_length else ""
        print(f"warning: {length} tokens exceed training.seq_len = {model.trained_length}{hint}.", file=sys.stderr)


def respond(
    model: TrainedModel,
    text: str,
    decoding: Decoding,
    *,
    memory: MemorySettings | AdaptedMemory | None,
    new_tokens: int | None,
    chat_template: str | None,
    watch: bool,
    save_memory: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Respond to a prompt; return the texts, the costs (times in seconds), the checkpoint and the adapter.

    The response ends before end-of-text, and with a chat template before the end of the turn.

    Args:
        memory: settings, with which fast weights are adapted to the prompt first; or the memory of another prompt, to
            be read. None: no memory.
        new_tokens: [MASK]s to append to the prompt; None for 64, or 0 if the prompt has [MASK]s.
        chat_template: one of `chat.TEMPLATES` or the path of a Jinja file; None for the plain prompt.
        watch: draw the text in the terminal after every step.
        save_memory: file that gets the memory of the prompt. There may then be nothing to fill in.
        overwrite: replace that file.

    Raises:
        UserError: if there is no [MASK] to fill in, if the template rejects the prompt, or if the memory cannot be
            saved.
    """
    texts = _Texts(model, chat_template)
    prompt = texts.encode(text)
    new_tokens = _count_new_tokens(model, prompt, new_tokens)
    if save_memory is None and not new_tokens and model.mask_id not in prompt:
        raise UserError(f"There is nothing to fill in: the prompt has no {MASK} and --new-tokens is 0.")
    length = len(prompt) + new_tokens
    _warn_if_long(model, length, memory)
    screen = Screen(model) if watch else None

    def draw(decoder: Decoder) -> None:
        if screen:
            screen.draw(decoder.state(length).to_host(), length)

    made = model.generate([prompt], new_tokens, decoding, memory, on_step=draw)
    if screen:
        screen.clear()
    if save_memory is not None and made.adapted is not None:
        model.save_memory(save_memory, made.adapted, overwrite)
    return {
        **texts.answer(text, made.tokens_BL[0, : len(prompt)].tolist(), made.responses[0], memory),
        "passes": made.passes,
        "memory_steps": made.memory_steps,
        "memory_seconds": round(made.memory_seconds, 4),
        "decoding_seconds": round(made.decoding_seconds, 4),
    }


def respond_to_all(
    model: TrainedModel,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    slots: int,
    memory: MemorySettings | AdaptedMemory | None,
    new_tokens: int | None,
    chat_template: str | None,
    progress: Callable[[], object],
) -> tuple[list[dict[str, Any]], Served]:
    """Respond to many prompts by continuous batching; return one answer per prompt, and the counts.

    The place of a prompt among all prompts keys its random numbers.

    Args:
        prompts: prompts of a file; their own number of new tokens overrides `new_tokens`.
        slots: rows that each data-parallel rank decodes at a time.
        progress: callback, called after each response of this data-parallel rank.

    For the other arguments see `respond`.

    Raises:
        UserError: names the first prompt with no [MASK] to fill in, or that the template rejects.
    """
    texts = _Texts(model, chat_template)
    requests = []
    for number, prompt in enumerate(prompts):
        try:
            ids = texts.encode(prompt.text)
        except UserError as error:
            raise UserError(f"{prompt.label}: {error}") from None
        count = _count_new_tokens(model, ids, new_tokens if prompt.new_tokens is None else prompt.new_tokens)
        if not count and model.mask_id not in ids:
            raise UserError(f"{prompt.label} has nothing to fill in (no {MASK} and no new tokens); remove the line.")
        requests.append(Request(ids, count, number))
    _warn_if_long(model, max(request.length for request in requests), memory)
    served = serve(model, requests, decoding, slots, memory, lambda number, response: progress())
    answers = [
        {"id": prompt.id, **texts.answer(prompt.text, response.prompt, response.response, memory)}
        for prompt, response in zip(prompts, served.responses, strict=True)
    ]
    return answers, served
