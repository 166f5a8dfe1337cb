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
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.inference.model_arguments import add_decoding_arguments, add_model_arguments, get_decoding, load_model
from memdlm_dist.inference.respond import MASK, respond
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides
from memdlm_dist.runtime.rank_0 import from_rank_0, is_rank_0, one_line


def parser() -> argparse.ArgumentParser:
    p = new_parser("generate.py", __doc__)
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
        prompt = "" if options.json else "> "
        while (text := from_rank_0(lambda: _ask(prompt))) is not None:
            if text.strip():
                yield text
        return
    text = from_rank_0(lambda: _given(options))
    assert text is not None
    yield text


def _ask(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt cannot be read: {one_line(error)}; write it in UTF-8.") from None


def _given(options: argparse.Namespace) -> str:
    try:
        if options.prompt is not None:
            options.prompt.encode("utf-8")  # an argument that is no UTF-8 has surrogates in it
            return str(options.prompt)
        if options.file:
            return str(options.file.read_text(encoding="utf-8"))
        # In some locales Python takes any byte of standard input for text.
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except (OSError, UnicodeError) as error:
        given = "of --prompt" if options.prompt is not None else options.file or "on standard input"
        remedy = "write it in UTF-8" if isinstance(error, UnicodeError) else "correct --file"
        raise UserError(f"The prompt {given} cannot be read: {one_line(error)}; {remedy}.") from None


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    decoding = get_decoding(options)
    model = load_model(options, overrides, options.checkpoint)
    try:
        watch = is_rank_0() and sys.stdout.isatty() and not (options.json or options.no_watch)
        for text in prompts(options):
            made = respond(
                model,
                text,
                decoding,
                memory=options.memory == "on",
                anchor_ratio=options.anchor_ratio,
                new_tokens=options.new_tokens,
                chat_template=options.chat_template,
                watch=watch,
            )
            if not is_rank_0():
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
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: generate(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
