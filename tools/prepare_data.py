r"""Prepare a text corpus as tokenised shards for training.

Examples:
  # The sources of the Python standard library, with a new tokenizer of 2,048 tokens
  python tools/prepare_data.py --builtin --train-tokenizer 2048 --seq-len 256 --output data/stdlib
  # Documents in the field "text", in rows of 4,096 tokens
  python tools/prepare_data.py --input 's3://bucket/corpus/*.jsonl.zst' --tokenizer LLaDA-8B-Base \
      --mask-token '<|mdm_mask|>' --seq-len 4096 --output data/corpus
  # Documents of up to 131,072 tokens in packed rows
  python tools/prepare_data.py --input books/ --tokenizer LLaDA-8B-Base --mask-token '<|mdm_mask|>' \
      --pack-documents --seq-len 131072 --output data/books
  # Fine-tuning on LongAlpaca (instruction, input, output), with the loss on the responses only
  python tools/prepare_data.py --input LongAlpaca-12k.json --tokenizer LLaDA-8B-Base --chat-template llada \
      --mask-token '<|mdm_mask|>' --overlong clip-response --seq-len 4096 --output data/longalpaca_8b
  # The same data and tokenizer from the Hugging Face hub
  python tools/prepare_data.py --input Yukang/LongAlpaca-12k --tokenizer GSAI-ML/LLaDA-8B-Base --chat-template llada \
      --mask-token '<|mdm_mask|>' --overlong clip-response --seq-len 4096 --output data/longalpaca_8b

Writes DIR/train, DIR/heldout, DIR/tokenizer and DIR/summary.json. --overwrite replaces these, and never a file that
prepare_data.py did not write. SIGTERM ends the command with status 143 and leaves DIR unchanged.

prepare_data.py inspect shows prepared data instead; prepare_data.py inspect --help describes it.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data.chat import name_or_path
from memdlm_dist.data.output import SPLITS
from memdlm_dist.data.preparation import look
from memdlm_dist.data.preparation.prepare import prepare
from memdlm_dist.data.preparation.request import MAX_SEQ_LEN, PAD_MULTIPLE, PrepareConfig
from memdlm_dist.data.sequences import Fields, Format
from memdlm_dist.errors import require
from memdlm_dist.runtime.entry_point import guarded, new_parser, positive, quiet
from memdlm_dist.runtime.preemption import exiting_on_sigterm

INSPECT = """Show prepared data: card, counts, a histogram of lengths, and one sequence as text.

Examples:
  # The first training sequence
  python tools/prepare_data.py inspect data/corpus
  # The last held-out sequence, with all of its tokens
  python tools/prepare_data.py inspect data/corpus --split heldout --sequence -1 --full
  # Shards in a store, with another folder's tokenizer
  python tools/prepare_data.py inspect s3://bucket/corpus/train --tokenizer data/corpus/tokenizer

FOLDER is an output of prepare_data.py, or a folder of shards next to its tokenizer/; a path or a URL. From a URL only
the shards that are read are copied, to a temporary folder.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    p = new_parser("prepare_data.py", __doc__)
    p.usage = (
        "prepare_data.py (--input URL ... | --builtin) (--tokenizer DIR | --train-tokenizer SIZE) --seq-len N\n"
        "                       --output DIR [options]"
    )
    data = p.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="URL",
        help="JSONL, JSON or Parquet files, compressed or not: paths, folders, glob patterns or fsspec URLs; or "
        "datasets of the Hugging Face hub: ORG/NAME or ORG/NAME@REVISION",
    )
    source.add_argument("--builtin", action="store_true", help="use the source files of the Python standard library")
    data.add_argument("--split", default="train", metavar="NAME", help="split of the hub's datasets (default: train)")
    data.add_argument(
        "--subset", metavar="NAME", help="subset (configuration) of the hub's datasets (default: the dataset's default)"
    )
    data.add_argument(
        "--format",
        choices=get_args(Format),
        help="fields of a row (default: detected from each row)",
    )
    data.add_argument(
        "--text-field", default="text", metavar="NAME", help="field that holds a document (default: text)"
    )
    data.add_argument(
        "--prompt-field", default="prompt", metavar="NAME", help="field that holds a prompt (default: prompt)"
    )
    data.add_argument(
        "--response-field", default="response", metavar="NAME", help="field that holds a response (default: response)"
    )
    data.add_argument("--limit", type=positive, metavar="N", help="maximum number of rows to read (default: all rows)")
    data.add_argument("--strict", action="store_true", help="stop at the first bad row instead of counting it")
    tokens = p.add_argument_group("tokenizer")
    pieces = tokens.add_mutually_exclusive_group(required=True)
    pieces.add_argument(
        "--tokenizer", metavar="DIR", help="folder of a Hugging Face tokenizer.json, or repository ORG/NAME of the hub"
    )
    pieces.add_argument(
        "--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE tokenizer of SIZE tokens"
    )
    tokens.add_argument(
        "--mask-token", metavar="NAME", help="mask token; added if the vocabulary lacks it (default: the tokenizer's)"
    )
    tokens.add_argument(
        "--eos-token",
        metavar="NAME",
        help="end-of-text token; added if the vocabulary lacks it (default: the tokenizer's)",
    )
    tokens.add_argument(
        "--chat-template",
        type=name_or_path,
        metavar="NAME",
        help="template that formats fine-tuning rows as conversations: LLaDA-8B's (llada), LLaDA2's (llada2), the "
        "tokenizer's own (tokenizer), or a file (PATH.jinja); its generation blocks, if any, are the responses "
        "(default: plain text)",
    )
    tokens.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="tokenise names of special tokens in the text as special tokens (default: as ordinary text)",
    )
    layout = p.add_argument_group("layout")
    layout.add_argument(
        "--seq-len",
        type=int,
        required=True,
        metavar="N",
        help=f"row length in tokens (training.seq_len), from 2 to {MAX_SEQ_LEN:,}",
    )
    layout.add_argument(
        "--overlong",
        choices=("drop", "truncate", "clip-response"),
        default="drop",
        help="treatment of fine-tuning rows longer than --seq-len: drop: leave them out; truncate: cut them at "
        "--seq-len; clip-response: also remove a prompt at the cut, in rows with several responses. A row whose prompt "
        "leaves no room for a response is always left out (default: drop)",
    )
    padding = layout.add_mutually_exclusive_group()
    padding.add_argument(
        "--pad-multiple",
        type=positive,
        metavar="N",
        help="pad fine-tuning rows with end-of-text, which is masked and scored, to a multiple of N tokens (default: "
        f"{PAD_MULTIPLE})",
    )
    padding.add_argument(
        "--pad-to-length", action="store_true", help="pad fine-tuning rows to --seq-len, as memdlm_dist 0.1 does"
    )
    layout.add_argument(
        "--pack-documents",
        action="store_true",
        help="pack whole documents or fine-tuning rows by best fit, several to a row, with separate attention, "
        "positions, noise and memory (default: documents concatenated and cut, fine-tuning rows padded)",
    )
    output = p.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    output.add_argument(
        "--held-out",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the input that is held out, from 0 to below 1 (default: 0.01)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing shards in DIR")
    return p


def inspect_parser() -> argparse.ArgumentParser:
    """Return the parser of `prepare_data.py inspect`."""
    p = new_parser("prepare_data.py inspect", INSPECT)
    p.usage = "prepare_data.py inspect FOLDER [options]"
    data = p.add_argument_group("data")
    data.add_argument("folder", metavar="FOLDER", help="path or URL of prepared data")
    data.add_argument(
        "--split", choices=SPLITS, default="train", help="part of an output of prepare_data.py (default: train)"
    )
    data.add_argument(
        "--tokenizer", metavar="DIR", help="folder, URL or hub repository of the tokenizer (default: the output's)"
    )
    data.add_argument(
        "--rows", type=positive, default=1000, metavar="N",
        help="largest number of rows to count lengths in (default: 1000)",
    )  # fmt: skip
    display = p.add_argument_group("sequence")
    display.add_argument(
        "--sequence", type=int, default=0, metavar="N", help="sequence to show; -1 is the last (default: 0)"
    )
    display.add_argument("--full", action="store_true", help="show long sequences without leaving out their middle")
    display.add_argument(
        "--color", choices=get_args(look.Colour), default="auto",
        help="colours instead of names of the parts; auto: in a terminal, unless NO_COLOR is set (default: auto)",
    )  # fmt: skip
    return p


def inspect(options: argparse.Namespace) -> int:
    """Print the report about prepared data and return the exit status.

    Raises:
        UserError: if the data are missing or damaged, or have no such sequence.
    """
    quiet()
    look.show(
        look.report(
            options.folder,
            options.split,
            options.tokenizer,
            options.rows,
            options.sequence,
            options.color,
            options.full,
        )
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["inspect"]:
        return guarded(lambda: inspect(inspect_parser().parse_args(argv[1:])))
    p = parser()
    options = p.parse_args(argv)
    if not 0 <= options.held_out < 1:
        p.error("--held-out must be at least 0 and below 1")
    with exiting_on_sigterm():
        return guarded(lambda: write(get_request(options)))


def get_request(options: argparse.Namespace) -> PrepareConfig:
    """Return the preparation that the options describe.

    Raises:
        UserError: if --output is empty.
    """
    require(bool(options.output.strip()), "--output is empty; name a folder to write to.")
    require(
        not options.pack_documents or not (options.pad_multiple or options.pad_to_length),
        "--pack-documents fills rows of --seq-len tokens, so --pad-multiple and --pad-to-length have no effect; omit "
        "them.",
    )
    return PrepareConfig(
        output=Path(options.output),
        seq_len=options.seq_len,
        inputs=tuple(options.input or ()),
        split=options.split,
        subset=options.subset,
        tokenizer=options.tokenizer,
        train_tokenizer=options.train_tokenizer,
        mask_token=options.mask_token,
        eos_token=options.eos_token,
        row_format=options.format,
        chat_template=options.chat_template,
        fields=Fields(options.text_field, options.prompt_field, options.response_field),
        held_out=options.held_out,
        overlong=options.overlong,
        pad_multiple=None if options.pad_to_length else options.pad_multiple or PAD_MULTIPLE,
        pack_documents=options.pack_documents,
        parse_special_tokens=options.parse_special_tokens,
        strict=options.strict,
        overwrite=options.overwrite,
        limit=options.limit,
    )


def write(request: PrepareConfig) -> int:
    """Prepare the shards, print the counts, and return the exit status."""
    summary = prepare(request)
    counts = ", ".join(f"{n:,} {part}" for part, n in summary.sequences.items())
    print(f"{request.output}: {counts} sequences of {request.seq_len} tokens at most")
    print(
        f"  {summary.rows:,} rows, {summary.tokens:,} tokens; {summary.bad_rows:,} bad rows, "
        f"{summary.overlong_dropped:,} over-long rows dropped, {summary.overlong_truncated:,} truncated, "
        f"{summary.tail_tokens_dropped:,} tokens left over"
    )
    if summary.special_tokens:
        token_counts = ", ".join(f"{token} {n:,} times" for token, n in summary.special_tokens.items())
        treatment = "parsed" if request.parse_special_tokens else "kept as text"
        print(f"  special tokens in the text, {treatment}: {token_counts}")
    for part, packing in summary.packing.items():
        rows = summary.sequences[part]
        print(
            f"  {part}: {packing.documents:,} documents packed, {packing.documents / rows:.1f} per sequence on average "
            f"and {packing.most_documents:,} at most; {100 * packing.efficiency:.1f}% of the tokens are not padding"
        )
    for part, shares in summary.padding.items():
        print(f"  {part}: {shares.content:,} tokens of content, {shares.padding:,} of padding, masked and scored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
