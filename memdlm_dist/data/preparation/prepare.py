"""Preparation of shards from a corpus: read, tokenise, cut to length, split off held-out rows, write."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.data import corpus, hub_dataset, output, tokenizer
from memdlm_dist.data.corpus import Row, Source
from memdlm_dist.data.output import SPLITS, SUMMARY, TOKENIZER
from memdlm_dist.data.preparation.request import PrepareConfig
from memdlm_dist.data.preparation.sequence_builder import SequenceBuilder, batches, training_text
from memdlm_dist.data.preparation.summary import SHOWN_PROBLEMS, Summary
from memdlm_dist.data.shards import Card, ShardWriter
from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.preemption import deferring_signals
from memdlm_dist.runtime.rank_0 import one_line
from memdlm_dist.runtime.writer import claimed, this_process


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
        config.check()
        with claimed(str(config.output), this_process()):
            output.recover(Path(config.output))
            folder_names = _check_output(config)
            # Tokenizer and shards belong together: either all of them are replaced, or none.
            with output.replacing(Path(config.output), folder_names) as folders, ExitStack() as stack:
                diffusion_tokenizer = _prepare_tokenizer(config, files, folders.get(TOKENIZER))
                card = Card(
                    config.seq_len,
                    diffusion_tokenizer.get_vocab_size(),
                    diffusion_tokenizer.mask_id,
                    diffusion_tokenizer.eos_id,
                    documents=config.pack_documents,
                    pad_multiple=config.padding,
                )
                with deferring_signals():  # MDSWriter needs empty folders, so they are unmarked until `begin`
                    writers = {split: stack.enter_context(ShardWriter(folders[split], card)) for split in SPLITS}
                    for split in SPLITS:
                        output.begin(folders[split])
                builder = SequenceBuilder(
                    config, diffusion_tokenizer, summary, partial(_bad_row, config, summary, report)
                )
                for batch in batches(_good_rows(config, files, summary, report)):
                    for split, sequence in builder.add(batch):
                        writers[split].write(sequence)
                for split, sequence in builder.finish():
                    writers[split].write(sequence)
                summary.sequences = {split: writer.card.sequences for split, writer in writers.items()}
                shares = {split: writer.shares() for split, writer in writers.items()}
                summary.padding = {split: counts for split, counts in shares.items() if counts.padding}
                if not summary.sequences["train"]:
                    raise UserError(_empty_message(config, summary))
            (Path(config.output) / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n")
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


def _check_output(config: PrepareConfig) -> tuple[str, ...]:
    """Check the output and return the folders to write, without tokenizer/ if its tokenizer is used unchanged.

    Raises:
        UserError: if a folder cannot be written or replaced.
    """
    folder_names: tuple[str, ...] = (TOKENIZER, *SPLITS)
    source, target = config.tokenizer, Path(config.output) / TOKENIZER
    if source is not None and Path(source).resolve() == target.resolve():
        folder_names = (
            SPLITS if tokenizer.has_special_tokens(source, config.mask_token, config.eos_token) else folder_names
        )
    output.check(Path(config.output), folder_names, config.overwrite)
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
    return tokenizer.train((training_text(row, config) for row in training), config.train_tokenizer, folder)


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
    problem = summary.add_bad_row(location, problem)
    if config.strict:
        raise UserError(f"Bad row at {location}: {problem}; correct the row, or omit --strict to skip bad rows.")
    if summary.bad_rows <= SHOWN_PROBLEMS:
        report(f"Skipped a bad row at {location}: {problem}.")
    elif summary.bad_rows == SHOWN_PROBLEMS + 1:
        report("Further bad rows are counted, but not shown.")
