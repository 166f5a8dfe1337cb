#!/usr/bin/env python
"""Generate text with a trained model: respond to a prompt, or fill in its [MASK]s.

    python tools/generate.py train_configs/quickstart.toml --prompt "def read(self"
    python tools/generate.py CONFIG --file prompt.txt --memory on --new-tokens 128
    python tools/generate.py CONFIG --prompt "for [MASK] in [MASK][MASK][MASK]:"
    echo "import" | python tools/generate.py CONFIG --json
    python tools/generate.py CONFIG --interactive

In a terminal the text fills in step by step. With --memory on the inner loop first writes the prompt into fast
weights, which that prompt alone is answered with. For a model that needs several accelerators start it under torchrun,
with the layout of the configuration. Keys of the configuration can follow: --section.key value.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch.distributed as dist

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.inference.model_arguments import (
    add_decoding_arguments,
    add_model_arguments,
    decoding_of,
    guarded,
    is_first,
    load_model,
    parse,
)
from memdlm_dist.inference.sampler import Decoding, Step
from memdlm_dist.inference.trained_model import TrainedModel, sampler

MASK = "[MASK]"
_NEW_TOKENS = 64
_BLANK, _DIM, _BOLD, _PLAIN = "░", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(p)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: standard input)")
    source.add_argument("--file", type=Path, metavar="FILE", help="file with the prompt")
    source.add_argument("--interactive", action="store_true", help="ask for prompts, one a line, until end of input")
    p.add_argument(
        "--chat-template",
        choices=chat.TEMPLATES,
        help="write the prompt as a user's turn: as LLaDA-8B does, or by the tokenizer's own template",
    )
    p.add_argument("--memory", choices=("off", "on"), default="off", help="write the prompt into fast weights first")
    output = p.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON object for each prompt, and nothing else")
    output.add_argument("--no-watch", action="store_true", help="do not show the text filling in")
    add_decoding_arguments(p, None)
    return p


def prompts(options: argparse.Namespace) -> Iterator[str]:
    """The prompts in turn, the same on all ranks: the first one reads them."""
    if options.interactive:
        while (text := _read_on_first(_ask)) is not None:
            if text.strip():
                yield text
        return
    text = _read_on_first(lambda: _given(options))
    assert text is not None
    yield text


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def _given(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    try:
        return options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt {options.file or 'on standard input'} cannot be read: {error}.") from None


def _read_on_first(read: Callable[[], str | None]) -> str | None:
    found: list[str | UserError | None] = [None]
    if is_first():
        try:
            found = [read()]
        except UserError as mistake:
            found = [mistake]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


class Screen:
    """Shows the canvas of one prompt in a terminal, redrawn in place."""

    def __init__(self, model: TrainedModel):
        self._model, self._lines = model, 0

    def draw(self, step: Step, length: int) -> None:
        """The text after a step: what was decided now in bold, [MASK]s as blocks."""
        tokens, still_open, kept = (x[0, :length].tolist() for x in step)
        cells: list[tuple[str, str]] = []  # (style, character)
        places = range(length)
        # Neighbours of one kind are decoded together: a character can be of several tokens.
        for (masked, new), group in groupby(places, key=lambda i: (still_open[i], kept[i])):
            found = list(group)
            text = _BLANK * len(found) if masked else self._model.tokenizer.decode([tokens[i] for i in found])
            style = _DIM if masked else _BOLD if new else ""
            cells += [(style, c if c.isprintable() or c == "\n" else " ") for c in text.expandtabs()]
        columns, rows = shutil.get_terminal_size()
        lines: list[list[tuple[str, str]]] = [[]]
        for style, c in cells:
            if c == "\n" or len(lines[-1]) == columns:
                lines.append([])
            if c != "\n":
                lines[-1].append((style, c))
        lines = lines[-(rows - 1) :]
        # Up over what was drawn before, which was never more.
        print(f"\x1b[{self._lines}F\x1b[J" if self._lines else "", end="")
        print("\n".join(map(_coloured, lines)), flush=True)
        self._lines = len(lines)

    def clear(self) -> None:
        """Make room for what is printed in its place."""
        print(f"\x1b[{self._lines}F\x1b[J" if self._lines else "", end="", flush=True)


def _coloured(line: list[tuple[str, str]]) -> str:
    groups = groupby(line, key=lambda cell: cell[0])
    return "".join(f"{style}{''.join(c for _, c in group)}{_PLAIN if style else ''}" for style, group in groups)


def run(model: TrainedModel, text: str, options: argparse.Namespace, decoding: Decoding, watch: bool) -> dict:
    """One prompt; returns what --json prints."""
    written = text.replace(MASK, model.tokenizer.mask_token)
    if options.chat_template:
        template = chat.chat_template(options.chat_template, model.tokenizer)
        written = chat.prompt(template, written)
    (prompt,) = model.tokenizer.encode_plain([written])
    masks = prompt.count(model.mask_id)
    new_tokens = options.new_tokens
    if new_tokens is None:
        new_tokens = 0 if masks else _NEW_TOKENS
    if not masks and not new_tokens:
        raise UserError(f"There is nothing to fill in: the prompt has no {MASK} and --new-tokens is 0.")
    length = len(prompt) + new_tokens
    if length > model.trained_length and is_first():
        print(f"warning: {length} tokens, more than the {model.trained_length} of training.", file=sys.stderr)
    remembered = model.remember([prompt], options.anchor_ratio) if options.memory == "on" else None
    start = model.canvas([prompt], new_tokens)
    screen = Screen(model) if watch else None
    steps, tokens_BL = 0, start.tokens_BL
    began = time.perf_counter()
    for step in model.denoise(start, decoding, remembered.fast if remembered else None):
        steps, tokens_BL = steps + 1, step.tokens_BL
        if screen:
            screen.draw(step, length)
    if screen:
        screen.clear()
    (response,) = sampler.responses(tokens_BL, start, model.eos_id)
    filled = [*tokens_BL[0, : len(prompt)].tolist(), *response]
    return {
        "prompt": text,
        "response": model.tokenizer.decode(response),
        "text": model.tokenizer.decode(filled),
        "memory": options.memory,
        "steps": steps,
        "memory_seconds": round(remembered.seconds, 4) if remembered else 0.0,
        "decoding_seconds": round(time.perf_counter() - began, 4),
        "checkpoint": model.checkpoint,
    }


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    decoding = decoding_of(options)
    model = load_model(options, overrides, options.checkpoint)
    try:
        watch = is_first() and sys.stdout.isatty() and not (options.json or options.no_watch)
        for text in prompts(options):
            made = run(model, text, options, decoding, watch)
            if not is_first():
                continue
            if options.json:
                print(json.dumps(made), flush=True)
                continue
            print(made["text"] if watch or MASK in text else made["response"], flush=True)
            memory = f"memory {made['memory_seconds']:.2f} s, " if options.memory == "on" else ""
            print(f"[{memory}{made['steps']} steps {made['decoding_seconds']:.2f} s]", file=sys.stderr)
    finally:
        model.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = parse(parser(), argv)
    return guarded(lambda: generate(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
