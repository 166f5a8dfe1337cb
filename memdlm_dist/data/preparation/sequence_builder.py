"""Conversion of corpus rows to training sequences: choose the split, tokenise, then cut, pad or pack."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from memdlm_dist.data import chat, corpus, sequences
from memdlm_dist.data.corpus import Row
from memdlm_dist.data.output import SPLITS
from memdlm_dist.data.packing import BestFit, Concatenation
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.summary import Packing, Summary
from memdlm_dist.data.sequences import BadRow, Document, Format, TrainingSequence
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.runtime.rank_0 import one_line

_BATCH = 64  # rows tokenised together
_BATCH_LENGTH = 1 << 18  # characters tokenised together if there are several rows; bounds the delay of signals
_KEY_ENCODER = json.JSONEncoder(sort_keys=True, default=str)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield groups of consecutive rows that `SequenceBuilder.add` takes."""
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _group_by_length(max_length: int, texts: Iterable[tuple[Row, str]]) -> Iterator[list[tuple[Row, str]]]:
    """Yield groups of consecutive rows, each with at most `max_length` characters or only one row."""
    group: list[tuple[Row, str]] = []
    size = 0
    for row, text in texts:
        if group and size + len(text) > max_length:
            yield group
            group, size = [], 0
        group.append((row, text))
        size += len(text)
    yield group


def is_held_out(row: Row, config: PrepareConfig) -> bool:
    """Return whether a row belongs to the held-out split.

    The split depends on the content alone: it is the same wherever the files are, and copies of a row are in the same
    split. In the built-in corpus a row is a whole file.
    """
    return corpus.is_held_out(_KEY_ENCODER.encode(row.values), config.held_out)


@contextlib.contextmanager
def errors_as_bad_rows() -> Iterator[None]:
    """Raise every error as a BadRow.

    Raises:
        BadRow: naming the error.
    """
    try:
        yield
    except (BadRow, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise BadRow(f"the row cannot be encoded ({one_line(error)})") from None


def training_text(row: Row, config: PrepareConfig) -> str:
    """Return the text of a row for training a tokenizer; empty for a bad or held-out row."""
    row_format = config.row_format or sequences.detect_format(row.values, config.fields)
    with contextlib.suppress(BadRow), errors_as_bad_rows():
        if is_held_out(row, config):
            return ""
        if row_format == "text":
            return sequences.document(row.values, config.fields)
        return "".join(text for text, _ in sequences.segments(row.values, row_format or "messages", config.fields))
    return ""


class SequenceBuilder:
    """Builder of training sequences from corpus rows; yields (split, sequence) pairs.

    Args:
        config: of the preparation.
        diffusion_tokenizer: encodes the rows.
        summary: counts what is added.
        report: called with the location and the problem of each bad row.
    """

    def __init__(
        self,
        config: PrepareConfig,
        diffusion_tokenizer: DiffusionTokenizer,
        summary: Summary,
        report: Callable[[str, str], None],
    ):
        self._config, self._tokenizer, self._summary, self._report = config, diffusion_tokenizer, summary, report
        name = config.chat_template
        self._template = chat.chat_template(name, diffusion_tokenizer) if name is not None else None
        self._concatenations = {split: Concatenation(config.seq_len) for split in SPLITS}
        self._best_fits = {split: BestFit(config.seq_len, diffusion_tokenizer.eos_id) for split in SPLITS}
        self._special_tokens: Counter[str] = Counter()
        self._end = np.array([diffusion_tokenizer.eos_id], dtype=np.uint32)

    def add(self, batch: list[Row]) -> Iterator[tuple[str, TrainingSequence]]:
        """Yield the sequences that a batch of rows completes; documents come last, since they are encoded together."""
        texts: list[tuple[Row, str]] = []
        for row in batch:
            try:
                row_format = self._row_format(row)
                if row_format == "text":
                    texts.append((row, sequences.document(row.values, self._config.fields)))
                    continue
                with errors_as_bad_rows():
                    encoded, split = self._encode_segments(row, row_format), self._choose_split(row)
            except BadRow as problem:
                self._report(row.location, str(problem))
            else:
                yield from self._fine_tuning_sequences(encoded, split)
        groups = _group_by_length(_BATCH_LENGTH, texts)
        for ids, split in chain.from_iterable(self._encode_documents(group) for group in groups):
            ids = np.concatenate((ids, self._end))
            self._summary.tokens += len(ids)
            if self._config.pack_documents:
                completed = self._best_fits[split].add(Document(ids, np.ones(len(ids), dtype=np.bool_)))
            else:
                completed = self._concatenations[split].add(ids)
            for sequence in completed:
                yield split, sequence

    def _row_format(self, row: Row) -> Format:
        row_format = self._config.row_format or sequences.detect_format(row.values, self._config.fields)
        if row_format is None:
            raise BadRow(f"none of the known formats; the row's fields are {', '.join(map(repr, row.values))}")
        return row_format

    def _encode_documents(self, texts: list[tuple[Row, str]]) -> Iterator[tuple[NDArray[np.uint32], str]]:
        """Encode documents together; if that fails, encode them one by one to find the bad rows."""
        try:
            with errors_as_bad_rows():
                encoded = self._encode([text for _, text in texts], self._config.parse_special_tokens)
                splits = [self._choose_split(row) for row, _ in texts]
        except BadRow as problem:
            if len(texts) > 1:
                for text in texts:
                    yield from self._encode_documents([text])
            else:
                self._report(texts[0][0].location, str(problem))
            return
        self._count_special_tokens(text for _, text in texts)
        yield from zip(encoded, splits, strict=True)

    def _encode_segments(self, row: Row, row_format: Format) -> list[tuple[NDArray[np.uint32], bool]]:
        """Encode the segments of a fine-tuning row separately, so that no token spans prompt and response."""
        fields, parse = self._config.fields, self._config.parse_special_tokens
        if self._template is None:
            pairs = sequences.segments(row.values, row_format, fields)
            plain_texts = [text for text, _ in pairs]
        else:
            messages = sequences.conversation(row.values, row_format, fields)
            plain_texts = [text for message in messages for text in message.values()]
            if not parse:
                self._check_messages(plain_texts)
            pairs = chat.segments(self._template, messages)
        encoded = self._encode([text for text, _ in pairs], parse or self._template is not None)
        self._count_special_tokens(plain_texts)
        return [(ids, is_response) for ids, (_, is_response) in zip(encoded, pairs, strict=True)]

    def _check_messages(self, texts: list[str]) -> None:
        """Check that no message contains a special token, which would be parsed as the chat template's markup.

        Raises:
            BadRow: naming the token.
        """
        for text in texts:
            if (token := self._tokenizer.find_special_token(text)) is not None:
                raise BadRow(
                    f"a message contains the special or added token '{token}', which would be parsed as the chat "
                    "template's markup (pass --parse-special-tokens to allow it)"
                )

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[NDArray[np.uint32]]:
        encoded = self._tokenizer.encode_arrays(texts, parse_special_tokens)
        if any((ids == self._tokenizer.mask_id).any() for ids in encoded):
            raise BadRow(f"the text contains the mask token '{self._tokenizer.mask_token}', which cannot be a label")
        return encoded

    def _count_special_tokens(self, texts: Iterable[str]) -> None:
        for text in texts:
            if counts := self._tokenizer.count_special_tokens(text):
                self._special_tokens += counts

    def _fine_tuning_sequences(
        self, encoded: list[tuple[NDArray[np.uint32], bool]], split: str
    ) -> Iterator[tuple[str, TrainingSequence]]:
        self._summary.tokens += sum(len(ids) for ids, _ in encoded)
        length, eos_id = self._config.seq_len, self._tokenizer.eos_id
        document, too_long = sequences.fine_tuning_document(
            encoded, length, eos_id, self._config.overlong, self._template is None
        )
        if document is None:
            self._summary.overlong_dropped += 1
            return
        self._summary.overlong_truncated += too_long
        if not self._config.pack_documents:
            yield split, sequences.padded(document, self._config.row_length(len(document.tokens)), eos_id)
            return
        for sequence in self._best_fits[split].add(document):
            yield split, sequence

    def _choose_split(self, row: Row) -> str:
        return SPLITS[is_held_out(row, self._config)]

    def finish(self) -> Iterator[tuple[str, TrainingSequence]]:
        """Yield the sequences that are still open, and complete the summary."""
        self._summary.special_tokens = dict(self._special_tokens)
        for split, best_fit in self._best_fits.items():
            for sequence in best_fit.finish():
                yield split, sequence
            if best_fit.rows:
                efficiency = best_fit.tokens / (best_fit.rows * self._config.seq_len)
                self._summary.packing[split] = Packing(
                    efficiency, best_fit.documents, best_fit.most_documents, best_fit.tokens
                )
        self._summary.tail_tokens_dropped = sum(x.tail for x in self._concatenations.values())
