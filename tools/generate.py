#!/usr/bin/env python
"""Generate text with a trained model: respond to a prompt, or fill in its [MASK]s.

Examples, after bash launch/quickstart.sh:
  python tools/generate.py train_configs/quickstart.toml --prompt "def read(self"
  python tools/generate.py train_configs/quickstart.toml --prompt "for [MASK] in [MASK][MASK][MASK]:"
  python tools/generate.py train_configs/quickstart.toml --file LICENSE --memory on --new-tokens 32
  echo "import" | python tools/generate.py train_configs/quickstart.toml --json
  python tools/generate.py train_configs/quickstart.toml --interactive
  python tools/generate.py train_configs/quickstart.toml --file LICENSE --memory on --memory-chunk 128 \
      --save-memory outputs/license.safetensors --new-tokens 0
  python tools/generate.py train_configs/quickstart.toml --prompt "The license" \
      --load-memory outputs/license.safetensors
  python tools/generate.py train_configs/quickstart.toml --prompts prompts.jsonl --output responses.jsonl

In a terminal the text fills in step by step. With --memory on the inner loop first adapts fast weights to the prompt;
they serve this prompt alone, unless --save-memory keeps them for others. --prompts decodes a file of many prompts in
batches: a finished response leaves its batch, and the next prompt enters. If the model needs several accelerators,
start the command under torchrun with the configuration's layout. Override configuration keys with --section.key value.
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
from memdlm_dist.inference import memory_file, prompt_file
from memdlm_dist.inference.memory_arguments import add_memory_arguments, check_memory_is_on, flags_of, get_memory
from memdlm_dist.inference.model_arguments import add_decoding_arguments, add_model_arguments, get_decoding, load_model
from memdlm_dist.inference.prompt_memory import AdaptedMemory, MemorySettings
from memdlm_dist.inference.respond import MASK, respond, respond_to_all
from memdlm_dist.inference.trained_model import TrainedModel
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
    add_model_arguments(p)
    memory = add_memory_arguments(p, decodes=True)
    memory.add_argument(
        "--memory", choices=("off", "on"), default="off", help="adapt fast weights to the prompt first (default: off)"
    )
    files = memory.add_mutually_exclusive_group()
    files.add_argument(
        "--save-memory",
        type=Path,
        metavar="FILE",
        help="write the prompt's memory to this file; needs --memory on; not in the paper. With --new-tokens 0 nothing "
        "is decoded",
    )
    files.add_argument(
        "--load-memory",
        type=Path,
        metavar="FILE",
        help="read a memory that --save-memory has written, such as that of a document, in place of the prompt's own; "
        "not in the paper. --anchor-ratio and --memory-weights are then for refreshes alone",
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
    group.add_argument("--overwrite", action="store_true", help="replace an existing --output or --save-memory")
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
    """Check the options that need others, and that no file would be overwritten.

    Raises:
        UserError: if an option does not fit, or an output exists.
    """
    if options.overwrite and options.output is None and options.save_memory is None:
        raise UserError("--overwrite is for --output and --save-memory; name that file, or omit --overwrite.")
    check_memory(options)
    if options.prompts is None:
        for flag in ("--batch-size", "--output"):
            if getattr(options, flag.strip("-").replace("-", "_")) is not None:
                raise UserError(f"{flag} is for many prompts; name their file with --prompts, or omit {flag}.")
    elif options.output is not None:
        if options.output.is_dir() or options.output.resolve() == options.prompts.resolve():
            kind = "a folder" if options.output.is_dir() else "the file of the prompts"
            raise UserError(f"--output {options.output} is {kind}; choose another file.")
        report.check_output(options.output.parent, options.output.name, overwrite=options.overwrite)


def check_memory(options: argparse.Namespace) -> None:
    """Check the options of the memory against each other.

    Raises:
        UserError: if an option needs another one, or excludes it.
    """
    settings, loads = get_memory(options), options.load_memory is not None
    if loads and options.memory == "on":
        raise UserError("--load-memory gives the memory, so the prompt is not written; omit --memory on.")
    if loads:
        settings.check_refresh_keeps_loaded()
        if settings.chunk is not None and settings.refresh == "none":
            raise UserError("--memory-chunk has no effect on a loaded memory without --memory-refresh; omit it.")
    if options.memory == "off":
        unread = [] if loads else flags_of(settings)
        check_memory_is_on(["--save-memory"] * (options.save_memory is not None) + unread)
    if options.save_memory is not None and (options.prompts is not None or options.interactive):
        raise UserError("--save-memory keeps the memory of one prompt; give that prompt with --prompt or --file.")
    if options.save_memory is not None and is_rank_0():  # before the model is loaded
        if options.file is not None and options.save_memory.resolve() == Path(options.file).resolve():
            raise UserError(f"--save-memory {options.save_memory} is the file of the prompt; choose another file.")
        memory_file.check_target(options.save_memory, options.overwrite)


def memory_of(options: argparse.Namespace, model: TrainedModel) -> MemorySettings | AdaptedMemory | None:
    """Return the memory that the responses read."""
    if options.load_memory is not None:
        memory = model.load_memory(options.load_memory, get_memory(options))
        if is_rank_0() and not options.json:
            (prompt,) = memory.prompts
            print(f"Memory of a prompt of {prompt.tokens:,} tokens loaded.", file=sys.stderr)
        return memory
    return get_memory(options) if options.memory == "on" else None


def uses_memory(options: argparse.Namespace) -> bool:
    """Return whether the responses read a memory."""
    return options.memory == "on" or options.load_memory is not None


def costs(steps: int, seconds: float) -> str:
    """Return the memory's costs as part of a line; nothing if no inner step ran."""
    return f"memory {steps} inner steps {seconds:.2f} s, " if steps else ""


def generate_all(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer the prompts of a file, print or write the responses on rank 0, and return the exit status."""
    decoding = get_decoding(options)
    # Rank 0 reads, before the model is loaded; the file need not exist on other nodes.
    prompts = prompt_file.read(options.prompts) if is_rank_0() else []
    model = load_model(options, overrides, options.checkpoint, decoding, memory=uses_memory(options))
    prompts = from_rank_0(lambda: prompts)
    try:
        share = len(model.data_parallel.share(len(prompts)))
        with tqdm(total=share, unit=" prompts", disable=not is_rank_0()) as bar:
            answers, served = respond_to_all(
                model,
                prompts,
                decoding,
                slots=options.batch_size or BATCH_SIZE,
                memory=memory_of(options, model),
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
    print(
        f"[{len(answers)} prompts, {served.tokens / seconds:.1f} tokens/s, "
        f"{costs(served.memory_steps, served.memory_seconds)}{served.passes} passes {served.decoding_seconds:.2f} s]",
        file=sys.stderr,
    )
    return 0


def generate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Answer the prompts, print the responses on rank 0, and return the exit status."""
    check(options)
    if options.prompts is not None:
        return generate_all(options, overrides)
    decoding = get_decoding(options)
    model = load_model(options, overrides, options.checkpoint, decoding, memory=uses_memory(options))
    try:
        watch = is_rank_0() and sys.stdout.isatty() and not (options.json or options.no_watch)
        memory = memory_of(options, model)
        for text in prompts(options):
            answer = respond(
                model,
                text,
                decoding,
                memory=memory,
                new_tokens=options.new_tokens,
                chat_template=options.chat_template,
                watch=watch,
                save_memory=options.save_memory,
                overwrite=options.overwrite,
            )
            if not is_rank_0():
                continue
            if options.json:
                print(json.dumps(answer), flush=True)
                continue
            if answer["passes"] or options.save_memory is None:
                print(answer["text"] if watch or MASK in text else answer["response"], flush=True)
            written = costs(answer["memory_steps"], answer["memory_seconds"])
            print(f"[{written}{answer['passes']} passes {answer['decoding_seconds']:.2f} s]", file=sys.stderr)
            if options.save_memory is not None:
                print(f"Memory written to {options.save_memory}.", file=sys.stderr)
    finally:
        model.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options, overrides = parse_with_overrides(parser(), argv)
    return guarded(lambda: generate(options, overrides))


if __name__ == "__main__":
    sys.exit(main())
