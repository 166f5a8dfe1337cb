#!/usr/bin/env python
"""Generate text with a trained model: respond to a prompt, or fill in its [MASK]s.

Examples, after bash launch/quickstart.sh:
  python tools/generate.py train_configs/quickstart.toml --prompt "def read(self"
  python tools/generate.py train_configs/quickstart.toml --prompt "for [MASK] in [MASK][MASK][MASK]:"
  python tools/generate.py train_configs/quickstart.toml --file LICENSE --memory on --new-tokens 32
  echo "import" | python tools/generate.py train_configs/quickstart.toml --json
  python tools/generate.py train_configs/quickstart.toml --interactive
  python tools/generate.py train_configs/quickstart.toml --prompts prompts.jsonl --output responses.jsonl

In a terminal the text fills in step by step. With --memory on the inner loop first adapts fast weights to the prompt;
they serve this prompt alone. --prompts decodes a file of many prompts in batches: a finished response leaves its batch,
and the next prompt enters. If the model needs several accelerators, start the command under torchrun with the
configuration's layout. Override configuration keys with --section.key value.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.inference import prompt_file
from memdlm_dist.inference.model_arguments import add_decoding_arguments, add_model_arguments, get_decoding, load_model
from memdlm_dist.inference.respond import MASK, respond, respond_to_all
from memdlm_dist.runtime.entry_point import guarded, new_parser, parse_with_overrides, positive
from memdlm_dist.runtime.rank_0 import from_rank_0, is_rank_0, one_line

BATCH_SIZE = 8


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("generate.py", __doc__)
    p.usage = (
        "generate.py CONFIG [--prompt TEXT | --file FILE | --prompts FILE | --interactive] [options] "
        "[--section.key value ...]"
    )
    model = add_model_arguments(p)
    model.add_argument(
        "--memory", choices=("off", "on"), default="off", help="adapt fast weights to the prompt first (default: off)"
    )
    data = p.add_argument_group("data")
    source = data.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text of the prompt (default: read it from standard input)")
    source.add_argument("--file", type=Path, metavar="FILE", help="UTF-8 file that holds the prompt")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='UTF-8 file with one JSON object per line: "prompt", and if wanted "new_tokens" and "id", a name for the '
        "output; prints one JSON object per prompt",
    )
    source.add_argument(
        "--interactive", action="store_true", help="read prompts from the terminal, one per line, until end of input"
    )
    data.add_argument(
        "--chat-template",
        type=chat.name_or_path,
        metavar="NAME",
        help="template that formats the prompt as a user's turn: LLaDA-8B's (llada), LLaDA2's (llada2), the "
        "tokenizer's own (tokenizer), or a file (PATH.jinja) (default: none)",
    )
    decoding = add_decoding_arguments(p, None)
    decoding.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"responses to --prompts that each data-parallel rank decodes at a time (default: {BATCH_SIZE})",
    )
    group = p.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file for the responses to --prompts, in their order (default: standard output)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    output = group.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print only one JSON object per prompt")
    output.add_argument("--no-watch", action="store_true", help="print only the final text, not the decoding steps")
    return p


def prompts(options: argparse.Namespace) -> Iterator[str]:
    """Yield the prompts, the same ones on all ranks; rank 0 reads them."""
    if options.interactive:
        prompt = "" if options.json else "> "
        while (text := from_rank_0(lambda: _ask(prompt))) is not None:
            if text.strip():
                yield text
        return
    text = from_rank_0(lambda: _read_prompt(options))
    assert text is not None
    yield text


def _ask(prompt: str) -> str | None:
    """Return the next line that the user types; None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt cannot be read: {one_line(error)}; write it in UTF-8.") from None


def _read_prompt(options: argparse.Namespace) -> str:
    """Return the prompt of --prompt, --file or standard input.

    Raises:
        UserError: if it cannot be read or is not UTF-8.
    """
    try:
        if options.prompt is not None:
            options.prompt.encode("utf-8")  # fails on surrogates, which replace bytes that are not UTF-8
            return str(options.prompt)
        if options.file:
            return str(options.file.read_text(encoding="utf-8"))
        # sys.stdin accepts any byte in some locales, so decode the bytes as UTF-8 here.
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except (OSError, UnicodeError) as error:
        source = "of --prompt" if options.prompt is not None else options.file or "on standard input"
        remedy = "write it in UTF-8" if isinstance(error, UnicodeError) else "correct --file"
        raise UserError(f"The prompt {source} cannot be read: {one_line(error)}; {remedy}.") from None


def check(options: argparse.Namespace) -> None:
    """Check the options that only a file of prompts takes, and that no file would be overwritten.

    Raises:
        UserError: if an option does not fit, or the output exists.
    """
    if options.overwrite and options.output is None:
        raise UserError("--overwrite is for --output; name that file, or omit --overwrite.")
    if options.prompts is None:
        for flag in ("--batch-size", "--output"):
            if getattr(options, flag.strip("-").replace("-", "_")) is not None:
                raise UserError(f"{flag} is for many prompts; name their file with --prompts, or omit {flag}.")
    elif options.output is not None:
        if options.output.is_dir() or options.output.resolve() == options.prompts.resolve():
            kind = "a folder" if options.output.is_dir() else "the file of the prompts"
            raise UserError(f"--output {options.output} is {kind}; choose another file.")
        report.check_output(options.output.parent, options.output.name, overwrite=options.overwrite)


def generate_all(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer the prompts of a file, print or write the responses on rank 0, and return the exit status."""
    decoding = get_decoding(options)
    # Rank 0 reads, before the model is loaded; the file need not exist on other nodes.
    prompts = prompt_file.read(options.prompts) if is_rank_0() else []
    model = load_model(options, overrides, options.checkpoint, decoding, memory=options.memory == "on")
    prompts = from_rank_0(lambda: prompts)
    try:
        share = len(model.data_parallel.share(len(prompts)))
        with tqdm(total=share, unit=" prompts", disable=not is_rank_0()) as bar:
            answers, served = respond_to_all(
                model,
                prompts,
                decoding,
                slots=options.batch_size or BATCH_SIZE,
                memory=options.memory == "on",
                anchor_ratio=options.anchor_ratio,
                new_tokens=options.new_tokens,
                chat_template=options.chat_template,
                progress=bar.update,
            )
    finally:
        model.close()
    if not is_rank_0():
        return 0
    if options.output is not None:
        prompt_file.write(options.output, answers)
    else:
        for answer in answers:
            print(json.dumps(answer))
    seconds = served.memory_seconds + served.decoding_seconds
    memory = f"memory {served.memory_seconds:.2f} s, " if options.memory == "on" else ""
    print(
        f"[{len(answers)} prompts, {served.tokens / seconds:.1f} tokens/s, {memory}{served.passes} passes "
        f"{served.decoding_seconds:.2f} s]",
        file=sys.stderr,
    )
    return 0


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer the prompts, print the responses on rank 0, and return the exit status."""
    check(options)
    if options.prompts is not None:
        return generate_all(options, overrides)
    decoding = get_decoding(options)
    model = load_model(options, overrides, options.checkpoint, decoding, memory=options.memory == "on")
    try:
        watch = is_rank_0() and sys.stdout.isatty() and not (options.json or options.no_watch)
        for text in prompts(options):
            answer = respond(
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
                print(json.dumps(answer), flush=True)
                continue
            print(answer["text"] if watch or MASK in text else answer["response"], flush=True)
            memory = f"memory {answer['memory_seconds']:.2f} s, " if options.memory == "on" else ""
            print(f"[{memory}{answer['passes']} passes {answer['decoding_seconds']:.2f} s]", file=sys.stderr)
    finally:
        model.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: generate(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
