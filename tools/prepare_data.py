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

  # A corpus of terabytes in a store, as one of 200 jobs (launch/prepare.sbatch); then prepare_data.py merge
  python tools/prepare_data.py --input 's3://bucket/corpus/**/*.jsonl' --tokenizer LLaDA-8B-Base \
      --mask-token '<|mdm_mask|>' --seq-len 4096 --output s3://bucket/tokens --partition 0/200

Writes train, heldout, tokenizer and summary.json to --output. On disk, --overwrite replaces these, and never a file
that prepare_data.py did not write. A command that was killed or stopped goes on where it was if it is repeated. SIGTERM
ends it with status 143.

Other commands, each with its own --help: prepare_data.py merge (complete the output of partitions) and
prepare_data.py inspect (show prepared data).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import get_args

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.compat.streaming import size_in_bytes
from memdlm_dist.data.chat import name_or_path
from memdlm_dist.data.output import SPLITS
from memdlm_dist.data.preparation import look
from memdlm_dist.data.preparation.prepare import merge, prepare
from memdlm_dist.data.preparation.request import (
    MAX_SEQ_LEN,
    PAD_MULTIPLE,
    TOKENIZER_SAMPLE,
    UNIT_SIZE,
    PrepareConfig,
)
from memdlm_dist.data.preparation.summary import Summary
from memdlm_dist.data.sequences import Fields, Format
from memdlm_dist.errors import require
from memdlm_dist.runtime.entry_point import guarded, new_parser, positive, quiet
from memdlm_dist.runtime.preemption import exiting_on_sigterm
from memdlm_dist.runtime.storage import is_remote

_MANY_LEFT = 0.05  # share of tokens left over that a larger unit would mend

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

MERGE = """Complete the output of --partition commands.

Examples:
  python tools/prepare_data.py merge --output s3://bucket/tokens

Checks that all units are there, and writes indices, cards and summary.json.
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
    data.add_argument(
        "--deduplicate",
        action="store_true",
        help="drop rows whose text an earlier row has; all rows are read twice",
    )
    data.add_argument(
        "--hash-only",
        action="store_true",
        help="with --deduplicate, only hash the rows and, without --partition, compare the hashes; run this for all "
        "partitions first, then without --partition",
    )
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
        "--tokenizer-sample",
        type=size,
        default=TOKENIZER_SAMPLE,
        metavar="SIZE",
        help="bytes of text for --train-tokenizer, from the beginning of every unit (default: 1gb)",
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
    layout.add_argument(
        "--unit-size",
        type=size,
        default=UNIT_SIZE,
        metavar="SIZE",
        help="bytes of input in a unit, the part of the corpus that one worker prepares at a time; every unit has "
        "shards of its own (default: 64mb)",
    )
    output = p.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="URL", help="folder or fsspec URL to write to")
    output.add_argument(
        "--held-out",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the input that is held out, from 0 to below 1 (default: 0.01)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="replace existing shards in a folder on disk, and discard an unfinished preparation with other options",
    )
    work = p.add_argument_group("work")
    work.add_argument("--workers", type=positive, metavar="N", help="number of processes (default: number of cores)")
    work.add_argument(
        "--cluster",
        metavar="URL",
        help="let a running cluster do the work: dask://HOST:PORT or ray://HOST:PORT (extra: cluster)",
    )
    work.add_argument(
        "--partition",
        type=partition,
        metavar="I/N",
        help="prepare only the units whose number modulo N is I; `merge` completes the output",
    )
    work.add_argument(
        "--scratch",
        metavar="DIR",
        help="folder for shards that are not complete or not uploaded (default: in --output, or a temporary folder)",
    )
    work.add_argument(
        "--scratch-limit",
        type=size,
        metavar="SIZE",
        help="maximum size of --scratch; fewer processes work at the same time if it is small (default: no limit)",
    )
    return p


def merge_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `merge`."""
    p = new_parser("prepare_data.py merge", MERGE)
    output = p.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="URL", help="folder or URL that the partitions wrote to")
    output.add_argument("--overwrite", action="store_true", help="replace existing shards in a folder on disk")
    return p


def size(text: str) -> int:
    """Parse a size such as 64mb into bytes (argparse type).

    Raises:
        argparse.ArgumentTypeError: if the text is not a size of at least one byte.
    """
    try:
        return positive(str(size_in_bytes(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a size; write one such as 64mb or 1gb") from None


def partition(text: str) -> tuple[int, int]:
    """Parse I/N, with I from 0 to N - 1 (argparse type).

    Raises:
        argparse.ArgumentTypeError: if the text is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not a partition; write I/N, with I from 0 to N - 1")
    return int(match[1]), int(match[2])


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
    require(bool(options.folder.strip()), "FOLDER is empty; name an output of prepare_data.py, or a folder of shards.")
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
    if argv[:1] == ["merge"]:
        merging = merge_parser().parse_args(argv[1:])
        return guarded(lambda: print_summary(merging.output, merge(merging.output, merging.overwrite)))
    if argv[:1] == ["inspect"]:
        return guarded(lambda: inspect(inspect_parser().parse_args(argv[1:])))
    p = parser()
    options = p.parse_args(argv)
    if not 0 <= options.held_out < 1:
        p.error("--held-out must be at least 0 and below 1")
    with exiting_on_sigterm("finished units are kept, and the same command goes on from there"):
        return guarded(lambda: write(get_request(options)))


def get_request(options: argparse.Namespace) -> PrepareConfig:
    """Return the preparation that the options describe.

    Raises:
        UserError: if --output is empty.
    """
    require(bool(options.output.strip()), "--output is empty; name a folder to write to.")
    require(all(name.strip() for name in options.input or ()), "--input is empty; name files, folders or URLs to read.")
    require(
        options.cluster is None or options.scratch_limit is None,
        "--scratch-limit bounds the processes of this machine and has no effect with --cluster; omit one of them.",
    )
    require(
        options.deduplicate or not options.hash_only,
        "--hash-only is the first pass of --deduplicate; give both.",
    )
    require(
        not options.pack_documents or not (options.pad_multiple or options.pad_to_length),
        "--pack-documents fills rows of --seq-len tokens, so --pad-multiple and --pad-to-length have no effect; omit "
        "them.",
    )
    return PrepareConfig(
        output=options.output if is_remote(options.output) else Path(options.output),
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
        unit_size=options.unit_size,
        tokenizer_sample=options.tokenizer_sample,
        deduplicate=options.deduplicate,
        hash_only=options.hash_only,
        workers=options.workers,
        cluster=options.cluster,
        partition=options.partition,
        scratch=options.scratch,
        scratch_limit=options.scratch_limit,
    )


def write(request: PrepareConfig) -> int:
    """Prepare the shards, print the counts, and return the exit status."""
    return print_summary(str(request.output), prepare(request), request)


def print_summary(output: str, summary: Summary, request: PrepareConfig | None = None) -> int:
    """Print the counts of a preparation and return the exit status.

    Args:
        request: None for those of several partitions.
    """
    part = request is not None and request.partition is not None
    if request is not None and request.hash_only:
        print(f"{output}: the hashes{' of the partition' * part} are written")
        return 0
    counts = ", ".join(f"{n:,} {split}" for split, n in summary.sequences.items()) or "no"
    where = "{}, partition {}/{}".format(output, *request.partition) if request and request.partition else output
    print(f"{where}: {counts} sequences")
    print(
        f"  {summary.rows:,} rows, {summary.tokens:,} tokens; {summary.bad_rows:,} bad rows, "
        f"{summary.duplicates:,} duplicates dropped, {summary.overlong_dropped:,} over-long rows dropped, "
        f"{summary.overlong_truncated:,} truncated, {summary.tail_tokens_dropped:,} tokens left over"
    )
    if summary.tail_tokens_dropped > _MANY_LEFT * summary.tokens:
        print("  Many tokens are left over, less than a row in each unit: use a larger --unit-size")
    if summary.special_tokens:
        token_counts = ", ".join(f"{token} {n:,} times" for token, n in summary.special_tokens.items())
        treatment = ", parsed" if request and request.parse_special_tokens else ", kept as text" if request else ""
        print(f"  special tokens in the text{treatment}: {token_counts}")
    for split, packing in summary.packing.items():
        rows = summary.sequences[split]
        print(
            f"  {split}: {packing.documents:,} documents packed, {packing.documents / rows:.1f} per sequence on "
            f"average and {packing.most_documents:,} at most; {100 * packing.efficiency:.1f}% of the tokens are not "
            "padding"
        )
    for split, shares in summary.padding.items():
        print(f"  {split}: {shares.content:,} tokens of content, {shares.padding:,} of padding, masked and scored")
    if part:
        print(f"  When all partitions are done: prepare_data.py merge --output {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
