"""Corpus to shards: read, tokenise, cut to length, split off a held-out part, write."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from memdlm_dist.data import chat, corpus, sequences, tokenizer
from memdlm_dist.data.corpus import Row, Source
from memdlm_dist.data.packing import BestFit, Concatenation
from memdlm_dist.data.sequences import BadRow, Document, Fields, Format
from memdlm_dist.data.shards import CARD, Card, ShardWriter, replacing
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError

PARTS = ("train", "heldout")
_BATCH = 64  # rows tokenised at once, on all cores
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Request:
    """What to prepare; `tools/prepare_data.py --help` describes each."""

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
    strict: bool = False
    overwrite: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Packing:
    """How well documents were packed."""

    efficiency: float  # share of the rows' tokens that is not fill
    documents: int
    most_documents: int  # of a row


@dataclass
class Summary:
    """What became of the corpus."""

    rows: int = 0
    bad_rows: int = 0
    tokens: int = 0
    overlong_dropped: int = 0
    overlong_truncated: int = 0
    tail_tokens_dropped: int = 0
    packing: dict[str, Packing] = field(default_factory=dict)  # of each part, if documents were packed
    sequences: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def prepare(request: Request, report: Callable[[str], None] = tqdm.write) -> Summary:
    """Write `output/{tokenizer,train,heldout}` and `output/summary.json`.

    Args:
        request: what to prepare.
        report: called with the location and the problem of a bad row.

    Raises:
        UserError: for an input, a tokenizer or an output that cannot be used, a corpus with nothing in
            it, and with `strict` for the first bad row.
    """
    _check_output(request)
    found = corpus.sources(request.inputs) if request.inputs else corpus.builtin_sources()
    summary = Summary()
    with ExitStack() as stack:
        # Tokenizer and shards belong together: they take their places together, or not at all.
        pieces = _settle_tokenizer(request, found, stack.enter_context(replacing(request.output / "tokenizer")))
        card = Card(
            request.seq_len,
            pieces.get_vocab_size(),
            pieces.mask_id,
            pieces.eos_id,
            documents=request.pack_documents,
        )
        folders = {part: stack.enter_context(replacing(request.output / part)) for part in PARTS}
        writers = {part: stack.enter_context(ShardWriter(folder, card)) for part, folder in folders.items()}
        cutter = _Cutter(request, pieces, summary)
        for batch in _batches(_good_rows(request, found, summary, report)):
            for part, sequence in cutter.add(batch, report):
                writers[part].write(sequence)
        for part, sequence in cutter.finish():
            writers[part].write(sequence)
        summary.sequences = {part: writer.card.sequences for part, writer in writers.items()}
        if not summary.sequences["train"]:
            raise UserError(_empty_message(request, summary))
    (request.output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def _check_output(request: Request) -> None:
    for part in PARTS:
        folder = request.output / part
        if folder.exists() and any(folder.iterdir()):
            if not request.overwrite:
                raise UserError(f"{folder} is not empty; choose another --output or pass --overwrite to replace it.")
            # Only what an earlier preparation wrote: a mistyped --output must not cost anybody a folder.
            for path in folder.iterdir():
                if path.name not in (CARD, "index.json") and not path.name.startswith("shard."):
                    raise UserError(f"{folder} holds {path.name}, which no preparation wrote; choose another --output.")
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {request.output} cannot be made: {error}.") from None


def _empty_message(request: Request, summary: Summary) -> str:
    if not summary.rows:
        return "The corpus is empty: the input holds no row; check --input."
    return (
        f"The corpus makes no training sequence of {request.seq_len} tokens: {summary.rows} rows read, "
        f"{summary.bad_rows} bad, {summary.overlong_dropped} too long, {summary.tokens} tokens; add text, lower "
        "--seq-len, or pass --overlong truncate."
    )


def _settle_tokenizer(request: Request, found: list[Source], folder: Path) -> DiffusionTokenizer:
    if request.train_tokenizer is None:
        assert request.tokenizer is not None
        return tokenizer.adopt(request.tokenizer, folder, request.mask_token, request.eos_token)
    quiet = Request(**{**vars(request), "strict": False})
    training = (row for row in _good_rows(quiet, found, Summary(), lambda _: None, "Training the tokenizer")
                if not _is_held_out(row, request))  # fmt: skip
    return tokenizer.train((_plain_text(row, request) for row in training), request.train_tokenizer, folder)


def _plain_text(row: Row, request: Request) -> str:
    form = request.form or sequences.detect_format(row.values, request.fields)
    try:
        if form == "text":
            return sequences.document(row.values, request.fields)
        return "".join(text for text, _ in sequences.segments(row.values, form or "messages", request.fields))
    except BadRow:
        return ""


def _good_rows(
    request: Request,
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


def _bad_row(request: Request, summary: Summary, report: Callable[[str], None], location: str, problem: str) -> None:
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


def _is_held_out(row: Row, request: Request) -> bool:
    # By content: preparing again splits alike wherever the files lie, and a row that stands twice in
    # the corpus cannot be in both parts. A document of the built-in corpus is a whole file.
    return corpus.is_held_out(json.dumps(row.values, sort_keys=True, default=str), request.held_out)


class _Cutter:
    """Rows to sequences of the requested length, each with the part it belongs to."""

    def __init__(self, request: Request, pieces: DiffusionTokenizer, summary: Summary):
        self._request, self._pieces, self._summary = request, pieces, summary
        name = request.chat_template
        self._template = chat.chat_template(name, pieces) if name is not None else None
        self._concatenations = {part: Concatenation(request.seq_len) for part in PARTS}
        self._best_fits = {part: BestFit(request.seq_len, pieces.eos_id) for part in PARTS}

    def add(self, batch: list[Row], report: Callable[[str], None]) -> Iterator[tuple[str, sequences.Sequence]]:
        texts: list[tuple[Row, str]] = []
        for row in batch:
            form = self._request.form or sequences.detect_format(row.values, self._request.fields)
            try:
                if form is None:
                    raise BadRow(f"none of the known formats; its fields are {', '.join(map(repr, row.values))}")
                if form == "text":
                    texts.append((row, sequences.document(row.values, self._request.fields)))
                else:
                    yield from self._fine_tuning(row, self._segments(row, form))
            except BadRow as problem:
                _bad_row(self._request, self._summary, report, row.location, str(problem))
        for (row, _), ids in zip(texts, self._pieces.encode_plain([text for _, text in texts]), strict=True):
            self._summary.tokens += len(ids) + 1
            part = self._part(row)
            ids = [*ids, self._pieces.eos_id]
            if self._request.pack_documents:
                made = self._best_fits[part].add(Document(ids, [True] * len(ids)))
            else:
                made = self._concatenations[part].add(ids)
            for sequence in made:
                yield part, sequence

    def _segments(self, row: Row, form: Format) -> list[tuple[str, bool]]:
        if self._template is None:
            return sequences.segments(row.values, form, self._request.fields)
        try:
            return chat.segments(self._template, sequences.conversation(row.values, form, self._request.fields))
        except ValueError as problem:
            raise BadRow(str(problem)) from None

    def _fine_tuning(self, row: Row, parts: list[tuple[str, bool]]) -> Iterator[tuple[str, sequences.Sequence]]:
        encoded = sequences.encode_segments(self._pieces, parts)
        self._summary.tokens += sum(len(ids) for ids, _ in encoded)
        length, eos_id = self._request.seq_len, self._pieces.eos_id
        document, too_long = sequences.fine_tuning(
            encoded, length, eos_id, self._request.overlong, self._template is None
        )
        if document is None:
            self._summary.overlong_dropped += 1
            return
        self._summary.overlong_truncated += too_long
        part = self._part(row)
        if not self._request.pack_documents:
            yield part, sequences.padded(document, length, eos_id)
            return
        for sequence in self._best_fits[part].add(document):
            yield part, sequence

    def _part(self, row: Row) -> str:
        return PARTS[_is_held_out(row, self._request)]

    def finish(self) -> Iterator[tuple[str, sequences.Sequence]]:
        """The rows that are left."""
        for part, best_fit in self._best_fits.items():
            for sequence in best_fit.finish():
                yield part, sequence
            if best_fit.rows:
                efficiency = best_fit.tokens / (best_fit.rows * self._request.seq_len)
                self._summary.packing[part] = Packing(efficiency, best_fit.documents, best_fit.most_documents)
        self._summary.tail_tokens_dropped = sum(x.tail for x in self._concatenations.values())
