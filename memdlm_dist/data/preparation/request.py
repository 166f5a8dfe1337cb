"""Settings of a preparation."""

from dataclasses import dataclass, field
from pathlib import Path

from memdlm_dist.data.row_lengths import padded_length
from memdlm_dist.data.sequences import Fields, Format, Overlong
from memdlm_dist.data.shards import Card
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import require

MAX_SEQ_LEN = 1 << 24
PAD_MULTIPLE = 128
UNIT_SIZE = 64 << 20
TOKENIZER_SAMPLE = 1 << 30


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of a preparation; `tools/prepare_data.py --help` describes each.

    Attributes:
        output: folder or URL.
        inputs: paths, patterns, URLs or hub datasets; empty for the built-in corpus.
        chat_template: one of `chat.TEMPLATES` or the path of a Jinja file.
        pad_multiple: None pads fine-tuning rows to seq_len.
        split, subset: of datasets of the hub.
        unit_size: bytes of text in a unit; the shards depend on it.
        tokenizer_sample: bytes of the corpus that a tokenizer is trained on.
        hash_only: with `deduplicate`, write only the hashes of the rows.
        workers: number of processes; None for the number of cores.
        cluster: address of a Dask or Ray cluster that does the work.
        partition: (I, N): prepare only the units whose number modulo N is I.
        scratch: folder for unfinished shards; None for a temporary folder, or the output if it is on disk.
        scratch_limit: largest number of bytes in `scratch`.
    """

    output: Path | str
    seq_len: int
    inputs: tuple[str, ...] = ()
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    mask_token: str | None = None
    eos_token: str | None = None
    row_format: Format | None = None
    chat_template: str | None = None
    fields: Fields = field(default_factory=Fields)
    held_out: float = 0.01
    overlong: Overlong = "drop"
    pad_multiple: int | None = PAD_MULTIPLE
    pack_documents: bool = False
    parse_special_tokens: bool = False
    strict: bool = False
    overwrite: bool = False
    limit: int | None = None
    split: str = "train"
    subset: str | None = None
    unit_size: int = UNIT_SIZE
    tokenizer_sample: int = TOKENIZER_SAMPLE
    deduplicate: bool = False
    hash_only: bool = False
    workers: int | None = None
    cluster: str | None = None
    partition: tuple[int, int] | None = None
    scratch: str | None = None
    scratch_limit: int | None = None

    @property
    def padding(self) -> int:
        """Multiple of tokens that fine-tuning rows are padded to; 0 if all rows have `seq_len` tokens."""
        multiple = self.pad_multiple or self.seq_len
        return 0 if self.pack_documents or multiple >= self.seq_len else multiple

    def row_length(self, tokens: int) -> int:
        """Return the length of a fine-tuning row with `tokens` tokens of content."""
        return padded_length(tokens, self.padding or self.seq_len, self.seq_len)

    def card(self, tokenizer: DiffusionTokenizer) -> Card:
        """Return the card of the shards, without counts."""
        return Card(
            self.seq_len,
            tokenizer.get_vocab_size(),
            tokenizer.mask_id,
            tokenizer.eos_id,
            documents=self.pack_documents,
            pad_multiple=self.padding,
        )

    def check(self) -> None:
        """Check the values that do not depend on the corpus.

        Raises:
            UserError: naming the first option that is out of range.
        """
        require(
            2 <= self.seq_len <= MAX_SEQ_LEN,
            f"--seq-len must be from 2 to {MAX_SEQ_LEN:,}, but is {self.seq_len}.",
        )
