"""Response to one prompt, or its [MASK]s filled in, as text."""

import sys
import time
from typing import Any

from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.inference import canvas
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.screen import Screen
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.runtime.rank_0 import is_rank_0

MASK = "[MASK]"
_NEW_TOKENS = 64


def respond(
    model: TrainedModel,
    text: str,
    decoding: Decoding,
    *,
    memory: bool,
    anchor_ratio: float,
    new_tokens: int | None,
    chat_template: str | None,
    watch: bool,
) -> dict[str, Any]:
    """Respond to a prompt; return the texts, the times in seconds, the checkpoint and the adapter.

    The response ends before end-of-text, and with a chat template before the end of the turn.

    Args:
        memory: adapt fast weights to the prompt first.
        anchor_ratio: share of the prompt's tokens that the memory's anchor masks.
        new_tokens: [MASK]s to append to the prompt; None for 64, or 0 if the prompt has [MASK]s.
        chat_template: one of `chat.TEMPLATES` or the path of a Jinja file; None for the plain prompt.
        watch: draw the text in the terminal after every step.

    Raises:
        UserError: if there is no [MASK] to fill in, or if the template rejects the prompt.
    """
    prompt_text = text.replace(MASK, model.tokenizer.mask_token)
    end_of_turn = None
    if chat_template:
        template = chat.chat_template(chat_template, model.tokenizer)
        prompt_text = chat.prompt(template, prompt_text)
        end_of_turn = chat.end_of_turn(template, model.tokenizer)
    (prompt,) = model.tokenizer.encode_plain([prompt_text])
    masks = prompt.count(model.mask_id)
    if new_tokens is None:
        new_tokens = 0 if masks else _NEW_TOKENS
    if not masks and not new_tokens:
        raise UserError(f"There is nothing to fill in: the prompt has no {MASK} and --new-tokens is 0.")
    length = len(prompt) + new_tokens
    if length > model.trained_length and is_rank_0():
        print(f"warning: {length} tokens exceed training.seq_len = {model.trained_length}.", file=sys.stderr)
    adapted = model.adapt([prompt], anchor_ratio) if memory else None
    start = model.canvas([prompt], new_tokens)
    screen = Screen(model) if watch else None
    began = time.perf_counter()
    decoder = model.decoder(start, decoding, adapted.fast if adapted else None)
    while decoder.step():
        if screen:
            screen.draw(decoder.state(length).to_host(), length)
    if screen:
        screen.clear()
    tokens_BL = decoder.state(start.tokens_BL.shape[1]).to_host().tokens_BL
    (response,) = canvas.responses(tokens_BL, start, model.eos_id)
    response = canvas.until(response, {end_of_turn})
    filled = [*tokens_BL[0, : len(prompt)].tolist(), *response]
    return {
        "prompt": text,
        "response": model.tokenizer.decode(response),
        "text": model.tokenizer.decode(filled),
        "memory": "on" if memory else "off",
        "passes": decoder.passes,
        "memory_seconds": round(adapted.seconds, 4) if adapted else 0.0,
        "decoding_seconds": round(time.perf_counter() - began, 4),
        "checkpoint": model.checkpoint,
        "adapter": model.adapter,
    }
