"""Preparation of shards from a corpus: read, tokenise, cut to length, split off held-out rows, write."""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.data import chat, corpus, hub_dataset, output, sequences, tokenizer
from memdlm_dist.data.corpus import Row, Source
from memdlm_dist.data.output import SPLITS, SUMMARY, TOKENIZER
from memdlm_dist.data.packing import BestFit, Concatenation
from memdlm_dist.data.row_lengths import TokenShares, padded_length
from memdlm_dist.data.sequences import BadRow, Document, Fields, Format, Overlong
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.preemption import deferring_signals
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.writer import claimed, this_process

MAX_SEQ_LEN = 1 << 24
PAD_MULTIPLE = 128
_BATCH = 64  # rows tokenised together, on all cores
_BATCH_LENGTH = 1 << 18  # characters tokenised together if there are several rows; bounds the delay of signals
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
    row_format: Format | None = None
    chat_template: str | None = None  # one of `chat.TEMPLATES` or the path of a Jinja file
    fields: Fields = field(default_factory=Fields)
    held_out: float = 0.01
    overlong: Overlong = "drop"
    pad_multiple: int | None = PAD_MULTIPLE  # None: fine-tuning rows are padded to seq_len
    pack_documents: bool = False
    parse_special_tokens: bool = False
    strict: bool = False
    overwrite: bool = False
    limit: int | None = None
    split: str = "train"  # of datasets of the hub
    subset: str | None = None  # of datasets of the hub


@dataclass(frozen=True)
class Packing:
    """Result of packing documents."""

    efficiency: float  # fraction of tokens that are not padding
    documents: int
    most_documents: int  # largest number in one row


@dataclass
class Summary:
    """Counts of a preparation."""

    rows: int = 0
    bad_rows: int = 0
    tokens: int = 0
    overlong_dropped: int = 0
    overlong_truncated: int = 0
    tail_tokens_dropped: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)  # token -> occurrences in the text
    packing: dict[str, Packing] = field(default_factory=dict)  # split -> result, with --pack-documents
    padding: dict[str, TokenShares] = field(default_factory=dict)  # split -> result, of fine-tuning rows
    sequences: dict[str, int] = field(default_factory=dict)  # split -> number of training sequences
    repositories: list[str] = field(default_factory=list)  # datasets and tokenizer of the hub: org/name@commit
    problems: list[str] = field(default_factory=list)


def prepare(config: PrepareConfig, report: Callable[[str], None] = tqdm.write) -> Summary:
    """Write `output/{tokenizer,train,heldout}` and `output/summary.json`.

    Args:
        report: called with a sentence about each of the first bad rows.

    Raises:
        UserError: if an input, the tokenizer or the output cannot be used, if the corpus makes no training sequence,
            and with `strict` for the first bad row.
    """
    files = _sources(config)
    if config.tokenizer is not None:
        config = replace(config, tokenizer=hub.tokenizer(config.tokenizer))
    summary = Summary(repositories=[str(file.repository) for file in files if isinstance(file, hub_dataset.HubSource)])
    if config.tokenizer is not None and (origin := hub.origin(config.tokenizer)) is not None:
        summary.repositories.append(str(origin))
    try:
        _check_length(config.seq_len)
        with claimed(str(config.output), this_process()):
            output.recover(config.output)
            folder_names = _check_output(config)
            # Tokenizer and shards belong together: either all of them are replaced, or none.
            with output.replacing(config.output, folder_names) as folders, ExitStack() as stack:
                diffusion_tokenizer = _prepare_tokenizer(config, files, folders.get(TOKENIZER))
                card = Card(
                    config.seq_len,
                    diffusion_tokenizer.get_vocab_size(),
                    diffusion_tokenizer.mask_id,
                    diffusion_tokenizer.eos_id,
                    documents=config.pack_documents,
                    pad_multiple=_pad_multiple(config),
                )
                with deferring_signals():  # MDSWriter needs empty folders, so they are unmarked until `begin`
                    writers = {split: stack.enter_context(ShardWriter(folders[split], card)) for split in SPLITS}
                    for split in SPLITS:
                        output.begin(folders[split])
                builder = _SequenceBuilder(config, diffusion_tokenizer, summary)
                for batch in _batches(_good_rows(config, files, summary, report)):
                    for split, sequence in builder.add(batch, report):
                        writers[split].write(sequence)
                for split, sequence in builder.finish():
                    writers[split].write(sequence)
                summary.sequences = {split: writer.card.sequences for split, writer in writers.items()}
                shares = {split: writer.shares() for split, writer in writers.items()}
                summary.padding = {split: counts for split, counts in shares.items() if counts.padding}
                if not summary.sequences["train"]:
                    raise UserError(_empty_message(config, summary))
            (config.output / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"The output folder {config.output} cannot be written to ({one_line(error)}); free space there, or "
            "choose another --output."
        ) from None
    return summary


def _sources(config: PrepareConfig) -> list[Source]:
    """Find the files and the datasets of the hub that the inputs name, in their order."""
    if not config.inputs:
        return corpus.builtin_sources()
    found: list[Source] = []
    for name in config.inputs:
        repository = hub.parse(name)
        if repository is None:
            found += corpus.sources([name])
        else:
            found.append(hub_dataset.load(repository, config.split, config.subset))
    return found


def _rows(source: Source) -> Iterator[Row]:
    return hub_dataset.rows(source) if isinstance(source, hub_dataset.HubSource) else corpus.rows(source)


def _check_length(seq_len: int) -> None:
    require(2 <= seq_len <= MAX_SEQ_LEN, f"--seq-len must be from 2 to {MAX_SEQ_LEN:,}, but is {seq_len}.")


def _pad_multiple(config: PrepareConfig) -> int:
    """Return the card's `pad_multiple`: 0 if all rows have `seq_len` tokens."""
    multiple = config.pad_multiple or config.seq_len
    return 0 if config.pack_documents or multiple >= config.seq_len else multiple


def _check_output(config: PrepareConfig) -> tuple[str, ...]:
    """Check the output and return the folders to write, without tokenizer/ if its tokenizer is used unchanged.

    Raises:
        UserError: if a folder cannot be written or replaced.
    """
    folder_names: tuple[str, ...] = (TOKENIZER, *SPLITS)
    source, target = config.tokenizer, config.output / TOKENIZER
    if source is not None and Path(source).resolve() == target.resolve():
        folder_names = (
            SPLITS if tokenizer.has_special_tokens(source, config.mask_token, config.eos_token) else folder_names
        )
    output.check(config.output, folder_names, config.overwrite)
    return folder_names


def _empty_message(config: PrepareConfig, summary: Summary) -> str:
    if not summary.rows:
        return "The corpus is empty: the input holds no row; check --input."
    if summary.bad_rows == summary.rows:
        return f"All rows of the corpus are bad (the first at {summary.problems[0]}); correct them."
    return (
        f"The corpus makes no training sequence of {config.seq_len} tokens: {summary.rows} rows read, "
        f"{summary.bad_rows} bad, {summary.overlong_dropped} too long, {summary.tokens} tokens; add text, lower "
        "--seq-len, or pass --overlong clip-response."
    )


def _prepare_tokenizer(config: PrepareConfig, files: list[Source], folder: Path | None) -> DiffusionTokenizer:
    """Train a tokenizer in `folder` or copy one to it; without a folder, load `config.tokenizer` unchanged."""
    if folder is None:
        assert config.tokenizer is not None
        return DiffusionTokenizer(config.tokenizer)
    output.begin(folder)
    if config.train_tokenizer is None:
        assert config.tokenizer is not None
        return tokenizer.adopt(config.tokenizer, folder, config.mask_token, config.eos_token)
    lenient = PrepareConfig(**{**vars(config), "strict": False})
    training = _good_rows(lenient, files, Summary(), lambda _: None, "Training the tokenizer")
    return tokenizer.train((_training_text(row, config) for row in training), config.train_tokenizer, folder)


def _training_text(row: Row, config: PrepareConfig) -> str:
    """Return the text of a row for training a tokenizer; empty for a bad or held-out row."""
    row_format = config.row_format or sequences.detect_format(row.values, config.fields)
    with contextlib.suppress(BadRow), _errors_as_bad_rows():
        if _is_held_out(row, config):
            return ""
        if row_format == "text":
            return sequences.document(row.values, config.fields)
        return "".join(text for text, _ in sequences.segments(row.values, row_format or "messages", config.fields))
    return ""


def _good_rows(
    config: PrepareConfig,
    files: list[Source],
    summary: Summary,
    report: Callable[[str], None],
    label: str = "Tokenising",
) -> Iterator[Row]:
    read = _rows if config.inputs else corpus.builtin_rows
    with tqdm(total=sum(source.size for source in files), unit="B", unit_scale=True, desc=label) as bar:
        for source in files:
            for row in read(source):
                if config.limit is not None and summary.rows >= config.limit:
                    return
                summary.rows += 1
                if row.problem is None:
                    yield row
                else:
                    _bad_row(config, summary, report, row.location, row.problem)
            bar.update(source.size)


def _bad_row(
    config: PrepareConfig, summary: Summary, report: Callable[[str], None], location: str, problem: str
) -> None:
    problem = problem[:_PROBLEM_LENGTH].encode(errors="backslashreplace").decode()  # may contain half a surrogate pair
    if config.strict:
        raise UserError(f"Bad row at {location}: {problem}; correct the row, or omit --strict to skip bad rows.")
    summary.bad_rows += 1
    if summary.bad_rows <= _SHOWN_PROBLEMS:
        report(f"Skipped a bad row at {location}: {problem}.")
        summary.problems.append(f"{location}: {problem}")
    elif summary.bad_rows == _SHOWN_PROBLEMS + 1:
        report("Further bad rows are counted, but not shown.")


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
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


def _is_held_out(row: Row, config: PrepareConfig) -> bool:
    # The split depends on the content alone: it is the same wherever the files are, and copies of a row are in the same
    # split. In the built-in corpus a row is a whole file.
    return corpus.is_held_out(json.dumps(row.values, sort_keys=True, default=str), config.held_out)


@contextlib.contextmanager
def _errors_as_bad_rows() -> Iterator[None]:
    try:
        yield
    except (BadRow, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise BadRow(f"the row cannot be encoded ({one_line(error)})") from None


class _SequenceBuilder:
    """Builder of training sequences from corpus rows; yields (split, sequence) pairs."""

    def __init__(self, config: PrepareConfig, diffusion_tokenizer: DiffusionTokenizer, summary: Summary):
        self._config, self._tokenizer, self._summary = config, diffusion_tokenizer, summary
        name = config.chat_template
        self._template = chat.chat_template(name, diffusion_tokenizer) if name is not None else None
        self._concatenations = {split: Concatenation(config.seq_len) for split in SPLITS}
        self._best_fits = {split: BestFit(config.seq_len, diffusion_tokenizer.eos_id) for split in SPLITS}
        self._special_tokens: Counter[str] = Counter()

    def add(self, batch: list[Row], report: Callable[[str], None]) -> Iterator[tuple[str, sequences.TrainingSequence]]:
        """Yield the sequences that a batch of rows completes; documents come last, since they are encoded together."""
        texts: list[tuple[Row, str]] = []
        for row in batch:
            try:
                row_format = self._row_format(row)
                if row_format == "text":
                    texts.append((row, sequences.document(row.values, self._config.fields)))
                    continue
                with _errors_as_bad_rows():
                    encoded, split = self._encode_segments(row, row_format), self._choose_split(row)
            except BadRow as problem:
                _bad_row(self._config, self._summary, report, row.location, str(problem))
            else:
                yield from self._fine_tuning_sequences(encoded, split)
        groups = _group_by_length(_BATCH_LENGTH, texts)
        for ids, split in chain.from_iterable(self._encode_documents(group, report) for group in groups):
            self._summary.tokens += len(ids) + 1
            ids = [*ids, self._tokenizer.eos_id]
            if self._config.pack_documents:
                completed = self._best_fits[split].add(Document(ids, [True] * len(ids)))
            else:
                completed = self._concatenations[split].add(ids)
            for sequence in completed:
                yield split, sequence

    def _row_format(self, row: Row) -> Format:
        row_format = self._config.row_format or sequences.detect_format(row.values, self._config.fields)
        if row_format is None:
            raise BadRow(f"none of the known formats; the row's fields are {', '.join(map(repr, row.values))}")
        return row_format

    def _encode_documents(
        self, texts: list[tuple[Row, str]], report: Callable[[str], None]
    ) -> Iterator[tuple[list[int], str]]:
        """Encode documents together; if that fails, encode them one by one to find the bad rows."""
        try:
            with _errors_as_bad_rows():
                encoded = self._encode([text for _, text in texts], self._config.parse_special_tokens)
                splits = [self._choose_split(row) for row, _ in texts]
        except BadRow as problem:
            if len(texts) > 1:
                for text in texts:
                    yield from self._encode_documents([text], report)
            else:
                _bad_row(self._config, self._summary, report, texts[0][0].location, str(problem))
            return
        self._count_special_tokens(text for _, text in texts)
        yield from zip(encoded, splits, strict=True)

    def _encode_segments(self, row: Row, row_format: Format) -> list[tuple[list[int], bool]]:
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

    def _encode(self, texts: list[str], parse_special_tokens: bool) -> list[list[int]]:
        encoded = (self._tokenizer.encode_plain if parse_special_tokens else self._tokenizer.encode_text)(texts)
        if any(self._tokenizer.mask_id in ids for ids in encoded):
            raise BadRow(f"the text contains the mask token '{self._tokenizer.mask_token}', which cannot be a label")
        return encoded

    def _count_special_tokens(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._special_tokens += self._tokenizer.count_special_tokens(text)

    def _fine_tuning_sequences(
        self, encoded: list[tuple[list[int], bool]], split: str
    ) -> Iterator[tuple[str, sequences.TrainingSequence]]:
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
            multiple = _pad_multiple(self._config) or length
            yield split, sequences.padded(document, padded_length(len(document.tokens), multiple, length), eos_id)
            return
        for sequence in self._best_fits[split].add(document):
            yield split, sequence

    def _choose_split(self, row: Row) -> str:
        return SPLITS[_is_held_out(row, self._config)]

    def finish(self) -> Iterator[tuple[str, sequences.TrainingSequence]]:
        """Yield the sequences that are still open, and complete the summary."""
        self._summary.special_tokens = dict(self._special_tokens)
        for split, best_fit in self._best_fits.items():
            for sequence in best_fit.finish():
                yield split, sequence
            if best_fit.rows:
                efficiency = best_fit.tokens / (best_fit.rows * self._config.seq_len)
                self._summary.packing[split] = Packing(efficiency, best_fit.documents, best_fit.most_documents)
        self._summary.tail_tokens_dropped = sum(x.tail for x in self._concatenations.values())
