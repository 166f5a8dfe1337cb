"""Shape of the rows in shards: documents, lengths and groups; whether the shards fit a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from memdlm_dist.data import row_lengths
from memdlm_dist.data.shards import read_card
from memdlm_dist.errors import UserError, require


@dataclass(frozen=True)
class Requirements:
    """Requirements of a run on its shards."""

    seq_len: int
    vocab_size: int  # the backbone's
    flavour: str
    mask_token_id: int  # the tokenizer's
    ring_attention: bool
    sequence_shards: int = 1  # tensor-parallel times context-parallel ranks; they divide a row


@dataclass(frozen=True)
class RowShape:
    """Documents and lengths of the rows of one or several streams.

    Attributes:
        most_documents: largest number of documents in a row. 0 if rows record none; None if a card of format 1, which
            does not state the number, has packed documents.
        buckets: possible lengths of a micro-batch; empty if all rows have one length.
        varying: locations of the streams with rows of different lengths.
    """

    most_documents: int | None = 0
    buckets: tuple[int, ...] = ()
    varying: tuple[str, ...] = ()

    @property
    def documents(self) -> bool:
        """True if samples carry document numbers."""
        return self.most_documents != 0


UNIFORM = RowShape()


def check_cards(locations: Sequence[str], run: Requirements) -> RowShape:
    """Check that the shards at `locations` fit a run, and return the shape of their rows.

    Raises:
        UserError: naming the folder and the value that does not fit.
    """
    most: list[int | None] = [0]
    multiple, varying = 0, []
    for location in locations:
        card = read_card(location)
        if not card.sequences:
            raise UserError(
                f"The shards in {location} hold no sequence; prepare them from a corpus that contains text."
            )
        if card.seq_len != run.seq_len:
            raise UserError(
                f"The shards in {location} hold sequences of {card.seq_len} tokens, but training.seq_len is "
                f"{run.seq_len}; change it, or prepare the data with --seq-len {run.seq_len}."
            )
        if card.vocab_size > run.vocab_size:
            raise UserError(
                f"The shards in {location} use a vocabulary of {card.vocab_size} tokens, but model.flavor "
                f"{run.flavour} has {run.vocab_size}; choose a larger flavour or a smaller tokenizer."
            )
        if card.mask_token_id != run.mask_token_id:
            raise UserError(
                f"The shards in {location} were made with mask token id {card.mask_token_id}, but the tokenizer in "
                f"model.hf_assets_path has {run.mask_token_id}; use the tokenizer that the data was prepared with."
            )
        if card.documents and run.ring_attention:
            raise UserError(
                f"The shards in {location} hold packed documents, which ring attention cannot keep apart; set "
                "parallelism.context_parallel_method = 'ulysses'."
            )
        most.append((card.most_documents or None) if card.documents else 0)
        if card.pad_multiple:
            _check_pad_multiple(location, card.pad_multiple, run)
            most.append(1)
            multiple = max(multiple, card.pad_multiple)
            varying.append(location)
    buckets = row_lengths.buckets(run.seq_len, multiple) if multiple else ()
    return RowShape(_max_documents(most), buckets, tuple(varying))


def _check_pad_multiple(location: str, multiple: int, run: Requirements) -> None:
    require(
        not run.ring_attention,
        f"The shards in {location} hold rows of different lengths, which ring attention cannot keep apart from their "
        "fill; set parallelism.context_parallel_method = 'ulysses', or prepare the data with --pad-to-length.",
    )
    for length in row_lengths.buckets(run.seq_len, multiple):
        require(
            length % run.sequence_shards == 0,
            f"The shards in {location} make micro-batches of {length} tokens, which {run.sequence_shards} tensor- and "
            "context-parallel ranks cannot divide; prepare the data with a --pad-multiple that they divide.",
        )


def group_size(rows: RowShape, samples_per_set: int, name: str, key: str, batch_size: int) -> int:
    """Return the number of consecutive rows that share a set of fast weights; 1 if rows hold several documents.

    Args:
        rows: shape of the rows.
        samples_per_set: number of samples that share a set.
        name: configuration key of the streams, for messages.
        key: configuration key of the micro-batch's rows, for messages.
        batch_size: rows of a micro-batch on one rank.

    Raises:
        UserError: if the number of documents in a row is not known, or a micro-batch does not hold whole groups.
    """
    require(
        rows.most_documents is not None or samples_per_set == 1,
        f"parametric_memory.samples_per_set = {samples_per_set} needs shards whose cards say how many documents a row "
        f"holds, unlike those in {name}; prepare the data anew.",
    )
    if rows.most_documents not in (0, 1):
        return 1
    require(
        batch_size % samples_per_set == 0,
        f"{key} = {batch_size} does not hold whole groups of parametric_memory.samples_per_set = {samples_per_set} "
        "rows; make it a multiple (if it is derived, with training.global_batch_size and max_local_batch_size).",
    )
    return samples_per_set


def _max_documents(most_documents: Sequence[int | None]) -> int | None:
    """Return the maximum of several numbers of documents in a row; None (unknown) if any of them is None."""
    known = [number for number in most_documents if number is not None]
    return max(known) if len(known) == len(most_documents) else None
