"""Turn a corpus into tokenised shards for training.

Examples:
  # The Python standard library's sources, with a new tokenizer of 2,048 tokens
  python tools/prepare_data.py --builtin --train-tokenizer 2048 --seq-len 256 --output data/stdlib
  # Documents under "text", packed to 4,096 tokens
  python tools/prepare_data.py --input 's3://bucket/corpus/*.jsonl.zst' --tokenizer LLaDA-8B-Base \\
      --mask-token '<|mdm_mask|>' --seq-len 4096 --output data/corpus
  # Documents of up to 131,072 tokens, kept apart
  python tools/prepare_data.py --input books/ --tokenizer LLaDA-8B-Base --mask-token '<|mdm_mask|>' \\
      --pack-documents --seq-len 131072 --output data/books
  # LongAlpaca: instruction, input, output; loss on the responses only
  python tools/prepare_data.py --input LongAlpaca-12k.json --tokenizer LLaDA-8B-Base --chat-template llada \\
      --mask-token '<|mdm_mask|>' --overlong truncate --seq-len 4096 --output data/longalpaca_8b

Writes OUTPUT/train, OUTPUT/heldout, OUTPUT/tokenizer and OUTPUT/summary.json. With --overwrite these are replaced, and
no file that prepare_data.py did not write. SIGTERM ends it with status 143 and leaves OUTPUT as it was.
"""

import argparse
import sys
from pathlib import Path

from memdlm_dist.runtime import cpu

cpu.prepare()

from memdlm_dist.data.chat import TEMPLATES
from memdlm_dist.data.prepare import MAX_SEQ_LEN, PrepareConfig, prepare
from memdlm_dist.data.sequences import Fields
from memdlm_dist.errors import require
from memdlm_dist.runtime.entry_point import guarded, new_parser, positive
from memdlm_dist.runtime.preemption import exiting_on_sigterm


def parser() -> argparse.ArgumentParser:
    p = new_parser("prepare_data.py", __doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="URL",
        help="JSONL, JSON or Parquet files, folders or glob patterns, at any fsspec URL, compressed or not",
    )
    source.add_argument("--builtin", action="store_true", help="the Python standard library's source files")
    p.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    p.add_argument(
        "--seq-len",
        type=int,
        required=True,
        metavar="N",
        help=f"tokens of one sequence (training.seq_len), from 2 to {MAX_SEQ_LEN:,}",
    )
    pieces = p.add_mutually_exclusive_group(required=True)
    pieces.add_argument("--tokenizer", metavar="DIR", help="folder with a Hugging Face tokenizer.json")
    pieces.add_argument("--train-tokenizer", type=int, metavar="SIZE", help="train a byte-level BPE of SIZE tokens")
    p.add_argument("--mask-token", metavar="NAME", help="mask token; looked up, or added if the vocabulary lacks it")
    p.add_argument("--eos-token", metavar="NAME", help="end-of-text token; looked up, or added likewise")
    p.add_argument(
        "--format",
        choices=("text", "prompt_response", "alpaca", "messages"),
        help="what the rows hold (default: told from each row's fields)",
    )
    p.add_argument(
        "--chat-template",
        choices=TEMPLATES,
        help="write fine-tuning rows as conversations: as LLaDA-8B does, or by the tokenizer's own template (default: "
        "as plain text)",
    )
    p.add_argument("--text-field", default="text", metavar="NAME", help="field of a document (default: text)")
    p.add_argument("--prompt-field", default="prompt", metavar="NAME", help="field of a prompt (default: prompt)")
    p.add_argument(
        "--response-field", default="response", metavar="NAME", help="field of a response (default: response)"
    )
    p.add_argument("--held-out", type=float, default=0.01, metavar="F", help="share held out (default: 0.01)")
    p.add_argument(
        "--overlong",
        choices=("drop", "truncate"),
        default="drop",
        help="fine-tuning rows longer than --seq-len (default: drop)",
    )
    p.add_argument(
        "--pack-documents",
        action="store_true",
        help="pack whole documents, or fine-tuning rows, several to a sequence as they fit best, and keep them apart "
        "in training: attention, positions, noise and memory (default: documents end to end, fine-tuning rows padded)",
    )
    p.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="read special tokens that are written in the text as such (default: as any other text)",
    )
    p.add_argument("--limit", type=positive, metavar="N", help="read at most N rows")
    p.add_argument("--strict", action="store_true", help="stop at the first bad row instead of counting it")
    p.add_argument("--overwrite", action="store_true", help="replace shards that are already in OUTPUT")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(argv)
    if not 0 <= a.held_out < 1:
        p.error("--held-out must be at least 0 and below 1")
    with exiting_on_sigterm():
        return guarded(lambda: write(get_request(a)))


def get_request(a: argparse.Namespace) -> PrepareConfig:
    require(bool(a.output.strip()), "--output is empty; name a folder to write to.")
    return PrepareConfig(
        output=Path(a.output),
        seq_len=a.seq_len,
        inputs=tuple(a.input or ()),
        tokenizer=a.tokenizer,
        train_tokenizer=a.train_tokenizer,
        mask_token=a.mask_token,
        eos_token=a.eos_token,
        row_format=a.format,
        chat_template=a.chat_template,
        fields=Fields(a.text_field, a.prompt_field, a.response_field),
        held_out=a.held_out,
        overlong=a.overlong,
        pack_documents=a.pack_documents,
        parse_special_tokens=a.parse_special_tokens,
        strict=a.strict,
        overwrite=a.overwrite,
        limit=a.limit,
    )


def write(request: PrepareConfig) -> int:
    """Prepare, and say what became of the corpus."""
    summary = prepare(request)
    counts = ", ".join(f"{n:,} {part}" for part, n in summary.sequences.items())
    print(f"{request.output}: {counts} sequences of {request.seq_len}")
    print(
        f"  {summary.rows:,} rows, {summary.tokens:,} tokens; {summary.bad_rows:,} bad rows, "
        f"{summary.overlong_dropped:,} over-long rows dropped, {summary.overlong_truncated:,} truncated, "
        f"{summary.tail_tokens_dropped:,} tokens left over"
    )
    if summary.special_tokens:
        found = ", ".join(f"{token} {n:,} times" for token, n in summary.special_tokens.items())
        print(f"  special tokens in the text, {'parsed' if request.parse_special_tokens else 'kept as text'}: {found}")
    for part, packing in summary.packing.items():
        rows = summary.sequences[part]
        print(
            f"  {part}: {packing.documents:,} documents packed, {packing.documents / rows:.1f} to a sequence and at "
            f"most {packing.most_documents:,}; {100 * packing.efficiency:.1f}% of the tokens are theirs"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
