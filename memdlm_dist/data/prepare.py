"""Corpus to shards: read, tokenise, cut to length, split off a held-out part, write."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from memdlm_dist.data import chat, corpus, output, sequences, tokenizer
from memdlm_dist.data.corpus import Row, Source
from memdlm_dist.data.output import PARTS, SUMMARY, TOKENIZER
from memdlm_dist.data.packing import BestFit, Concatenation
from memdlm_dist.data.sequences import BadRow, Document, Fields, Format
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.preemption import deferring_signals
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.writer import claimed, this_process

MAX_SEQ_LEN = 1 << 24
_BATCH = 64  # rows tokenised at once, on all cores
_BATCH_LENGTH = 1 << 18  # characters, if it is more than one row: signals wait for it
_SHOWN_PROBLEMS = 10
_PROBLEM_LENGTH = 300


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of a preparation; `tools/prepare_data.py --help` describes each."""

    output: Path
    seq_len: int
    inputs: tuple[str, ...] = ()  # empty: the built-in corpus
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    mask_token: str | None = None
    eos_token: str | None = None
    form: Format | None = None
    chat_template: str | None = None  # one of `chat.TEMPLATES`
    fields: Fields = field(default_factory=Fields)
    held_out: float = 0.01
    overlong: Literal["drop", "truncate"] = "drop"
    pack_documents: bool = False
    parse_special_tokens: bool = False
    strict: bool = False
    overwrite: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Packing:
    """Result of packing documents."""

    efficiency: float  # share of the rows' tokens that is not fill
    documents: int
    most_documents: int  # of a row


@dataclass
class Summary:
    """Counts of a preparation."""

    rows: int = 0
    bad_rows: int = 0
    tokens: int = 0
    overlong_dropped: int = 0
    overlong_truncated: int = 0
    tail_tokens_dropped: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)  # written in the text: how often
    packing: dict[str, Packing] = field(default_factory=dict)  # of each part, if documents were packed
    sequences: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def prepare(request: PrepareConfig, report: Callable[[str], None] = tqdm.write) -> Summary:
    """Write `output/{tokenizer,train,heldout}` and `output/summary.json`.

    Args:
        request: what to prepare.
        report: called with the location and the problem of a bad row.

    Raises:
        UserError: for an input, a tokenizer or an output that cannot be used, a corpus with nothing in
            it, and with `strict` for the first bad row.
    """
    found = corpus.sources(request.inputs) if request.inputs else corpus.builtin_sources()
    summary = Summary()
    try:
        _check_length(request.seq_len)
        with claimed(str(request.output), this_process()):
            output.recover(request.output)
            names = _check(request)
            # Tokenizer and shards belong together: they take their places together, or not at all.
            with output.replacing(request.output, names) as folders, ExitStack() as stack:
                pieces = _settle_tokenizer(request, found, folders.get(TOKENIZER))
                card = Card(
                    request.seq_len,
                    pieces.get_vocab_size(),
                    pieces.mask_id,
                    pieces.eos_id,
                    documents=request.pack_documents,
                )
                with deferring_signals():  # a writer wants an empty folder, which is not yet marked as ours
                    writers = {part: stack.enter_context(ShardWriter(folders[part], card)) for part in PARTS}
                    for part in PARTS:
                        output.begin(folders[part])
                cutter = _Cutter(request, pieces, summary)
                for batch in _batches(_good_rows(request, found, summary, report)):
                    for part, sequence in cutter.add(batch, report):
                        writers[part].write(sequence)
                for part, sequence in cutter.finish():
                    writers[part].write(sequence)
                summary.sequences = {part: writer.card.sequences for part, writer in writers.items()}
                if not summary.sequences["train"]:
                    raise UserError(_empty_message(request, summary))
            (request.output / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"The output folder {request.output} cannot be written to: {one_line(error)}; make room there, or choose "
            "another --output."
        ) from None
    return summary


def _check_length(seq_len: int) -> None:
    require(2 <= seq_len <= MAX_SEQ_LEN, f"--seq-len must be from 2 to {MAX_SEQ_LEN:,}, but is {seq_len}.")


def _check(request: PrepareConfig) -> tuple[str, ...]:
    """Check what to prepare; returns the folders to write, without the tokenizer's if that one is to stay as it is.

    Raises:
        UserError: naming what cannot be.
    """
    names: tuple[str, ...] = (TOKENIZER, *PARTS)
    source, place = request.tokenizer, request.output / TOKENIZER
    if source is not None and Path(source).resolve() == place.resolve():
        names = PARTS if tokenizer.is_settled(source, request.mask_token, request.eos_token) else names
    output.check(request.output, names, request.overwrite)
    return names


def _empty_message(request: PrepareConfig, summary: Summary) -> str:
    if not summary.rows:
        return "The corpus is empty: the input holds no row; check --input."
    return (
        f"The corpus makes no training sequence of {request.seq_len} tokens: {summary.rows} rows read, "
        f"{summary.bad_rows} bad, {summary.overlong_dropped} too long, {summary.tokens} tokens; add text, lower "
        "--seq-len, or pass --overlong truncate."
    )


def _settle_tokenizer(request: PrepareConfig, found: list[Source], folder: Path | None) -> DiffusionTokenizer:
    """Train a tokenizer in `folder`, or copy one there; without a folder, take the given one as it is."""
    if folder is None:
        assert request.tokenizer is not None
        return DiffusionTokenizer(request.tokenizer)
    output.begin(folder)
    if request.train_tokenizer is None:
        assert request.tokenizer is not None
        return tokenizer.adopt(request.tokenizer, folder, request.mask_token, request.eos_token)
    quiet = PrepareConfig(**{**vars(request), "strict": False})
    training = _good_rows(quiet, found, Summary(), lambda _: None, "Training the tokenizer")
    return tokenizer.train((_training_text(row, request) for row in training), request.train_tokenizer, folder)


def _training_text(row: Row, request: PrepareConfig) -> str:
    """Return the text of a row for training a tokenizer; empty for a bad or held-out one."""
    form = request.form or sequences.detect_format(row.values, request.fields)
    with contextlib.suppress(BadRow), _any_error_as_bad_row():
        if _is_held_out(row, request):
            return ""
        if form == "text":
            return sequences.document(row.values, request.fields)
        return "".join(text for text, _ in sequences.segments(row.values, form or "messages", request.fields))
    return ""


def _good_rows(
    request: PrepareConfig,
    found: list[Source],
    summary: Summary,
    report: Callable[[str], None],
    label: str = "Tokenising",
) -> Iterator[Row]:
    read = corpus.rows if request.inputs else corpus.builtin_rows
    with tqdm(total=sum(source.size for source in found), unit="B", unit_scale=True, desc=label) as bar:
        for source in found:
            for row in read(source):
                if request.limit is not None and summary.rows >= request.limit:
                    return
                summary.rows += 1
                if row.problem is None:
                    yield row
                else:
                    _bad_row(request, summary, report, row.location, row.problem)
            bar.update(source.size)


def _bad_row(
    request: PrepareConfig, summary: Summary, report: Callable[[str], None], location: str, problem: str
) -> None:
    problem = problem[:_PROBLEM_LENGTH].encode(errors="backslashreplace").decode()  # it may quote half a character
    if request.strict:
        raise UserError(f"Bad row at {location}: {problem}; correct it, or leave out --strict to skip bad rows.")
    summary.bad_rows += 1
    if summary.bad_rows <= _SHOWN_PROBLEMS:
        report(f"Skipped a bad row at {location}: {problem}.")
        summary.problems.append(f"{location}: {problem}")
    elif summary.bad_rows == _SHOWN_PROBLEMS + 1:
        report("Further bad rows are counted without being shown.")


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _up_to(length: int, texts: Iterable[tuple[Row, str]]) -> Iterator[list[tuple[Row, str]]]:
    """Yield consecutive rows in groups of at most `length` characters, or of one row."""
    group: list[tuple[Row, str]] = []
    size = 0
    for row, text in texts:
        if group and size + len(text) > length:
            yield group
            group, size = [], 0
        group.append((row, text))
        size += len(text)
    yield group


def _is_held_out(row: Row, request: PrepareConfig) -> bool:
    # By content: preparing again splits alike wherever the files lie, and a row that stands twice in
    # the corpus cannot be in both parts. A document of the built-in corpus is a whole file.
    return corpus.is_held_out(json.dumps(row.values, sort_keys=True, default=str), request.held_out)


@contextlib.contextmanager
def _any_error_as_bad_row() -> Iterator[None]:
    try:
        yield
    except (BadRow, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise BadRow(f"it cannot be encoded ({one_line(error)})") from None


class _Cutter:
    """Rows to sequences of the requested length, each with the part it belongs to."""

    def __init__(self, request: PrepareConfig, pieces: DiffusionTokenizer, summary: Summary):
        self._request, self._pieces, self._summary = request, pieces, summary
        name = request.chat_template
        self._template = chat.chat_template(name, pieces) if name is not None else None
        self._concatenations = {part: Concatenation(request.seq_len) for part in PARTS}
        self._best_fits = {part: BestFit(request.seq_len, pieces.eos_id) for part in PARTS}
        self._special_tokens: Counter[str] = Counter()

    def add(self, batch: list[Row], report: Callable[[str], None]) -> Iterator[tuple[str, sequences.TrainingSequence]]:
        """Yield the sequences that a batch of rows completes; its documents come last, encoded together."""
        texts: list[tuple[Row, str]] = []
        for row in batch:
            try:
                form = self._form(row)
                if form == "text":
                    texts.append((row, sequences.document(row.values, self._request.fields)))
                    continue
                with _any_error_as_bad_row():
                    encoded, part = self._encode_segments(row, form), self._part(row)
            except BadRow as problem:
                _bad_row(self._request, self._summary, report, row.location, str(problem))
            else:
                yield from self._fine_tuning(encoded, part)
        groups = _up_to(_BATCH_LENGTH, texts)
        for ids, part in chain.from_iterable(self._encode_documents(group, report) for group in groups):
            self._summary.tokens += len(ids) + 1
            ids = [*ids, self._pieces.eos_id]
            if self._request.pack_documents:
                made = self._best_fits[part].add(Document(ids, [True] * len(ids)))
            else:
                made = self._concatenations[part].add(ids)
            for sequence in made:
                yield part, sequence

    def _form(self, row: Row) -> Format:
        form = self._request.form or sequences.detect_format(row.values, self._request.fields)
        if form is None:
            raise BadRow(f"none of the known formats; its fields are {', '.join(map(repr, row.values))}")
        return form

    def _encode_documents(
        self, texts: list[tuple[Row, str]], report: Callable[[str], None]
    ) -> Iterator[tuple[list[int], str]]:
        """Encode documents together, or one by one if there is a bad one among them."""
        try:
            with _any_error_as_bad_row():
                encoded = self._encode([text for _, text in texts], self._request.parse_special_tokens)
                parts = [self._part(row) for row, _ in texts]
        except BadRow as problem:
            if len(texts) > 1:
                for text in texts:
                    yield from self._encode_documents([text], report)
            else:
                _bad_row(self._request, self._summary, report, texts[0][0].location, str(problem))
            return
        self._count_special_tokens(text for _, text in texts)
        yield from zip(encoded, parts, strict=True)

    def _encode_segments(self, row: Row, form: Format) -> list[tuple[list[int], bool]]:
        """Encode a fine-tuning row, each segment apart, so that no token spans prompt and response."""
        fields, parse = self._request.fields, self._request.parse_special_tokens
        if self._template is None:
            parts = sequences.segments(row.values, form, fields)
            written = [text for text, _ in parts]
        else:
            messages = sequences.conversation(row.values, form, fields)
            written = [text for message in messages for text in message.values()]
            if not parse:
                self._check_messages(written)
            parts = chat.segments(self._template, messages)
        encoded = self._encode([text for text, _ in parts], parse or self._template is not None)
        self._count_special_tokens(written)
        return [(ids, is_response) for ids, (_, is_response) in zip(encoded, parts, strict=True)]

    def _check_messages(self, texts: list[str]) -> None:
        """Check that no message holds what would be taken for the chat template's own.

        Raises:
            BadRow: naming the token.
        """
        for text in texts:
            if (token := self._pieces.special_token_in(text)) is not None:
                raise BadRow(
                    f"a message holds the special or added token {token}, which would be read as the chat template's "
                    "(see --parse-special-tokens)"
                )

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        encoded = (self._pieces.encode_plain if parse_special_tokens else self._pieces.encode_text)(texts)
        if any(self._pieces.mask_id in ids for ids in encoded):
            raise BadRow(f"its text holds the mask token {self._pieces.mask_token}, which is no text")
        return encoded

    def _count_special_tokens(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._special_tokens += self._pieces.special_tokens_in(text)

    def _fine_tuning(
        self, encoded: list[tuple[list[int], bool]], part: str
    ) -> Iterator[tuple[str, sequences.TrainingSequence]]:
        self._summary.tokens += sum(len(ids) for ids, _ in encoded)
        length, eos_id = self._request.seq_len, self._pieces.eos_id
        document, too_long = sequences.fine_tuning(
            encoded, length, eos_id, self._request.overlong, self._template is None
        )
        if document is None:
            self._summary.overlong_dropped += 1
            return
        self._summary.overlong_truncated += too_long
        if not self._request.pack_documents:
            yield part, sequences.padded(document, length, eos_id)
            return
        for sequence in self._best_fits[part].add(document):
            yield part, sequence

    def _part(self, row: Row) -> str:
        return PARTS[_is_held_out(row, self._request)]

    def finish(self) -> Iterator[tuple[str, sequences.TrainingSequence]]:
        """Flush the remaining rows."""
        self._summary.special_tokens = dict(self._special_tokens)
        for part, best_fit in self._best_fits.items():
            for sequence in best_fit.finish():
                yield part, sequence
            if best_fit.rows:
                efficiency = best_fit.tokens / (best_fit.rows * self._request.seq_len)
                self._summary.packing[part] = Packing(efficiency, best_fit.documents, best_fit.most_documents)
        self._summary.tail_tokens_dropped = sum(x.tail for x in self._concatenations.values())
