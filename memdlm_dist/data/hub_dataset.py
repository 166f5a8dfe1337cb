"""Datasets of the Hugging Face hub as corpus rows, through the library `datasets` and its cache.

Only builders of text formats are accepted: they parse data and neither unpickle nor run code. From release 4 on,
`datasets` runs no dataset scripts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from memdlm_dist.data.corpus import Row, Segment, Source
from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime import hub
from memdlm_dist.runtime.hub import Repository
from memdlm_dist.runtime.rank_0 import one_line

# Modules of datasets.packaged_modules; "cache" reads the Arrow files that an earlier call has prepared.
_CACHED = "cache"
_BUILDERS = ("json", "parquet", "csv", "text", "arrow", _CACHED)
_BATCH = 1024
_LENGTH = 300  # characters of an error's message


@dataclass(frozen=True)
class HubSource(Source):
    """One split of a dataset; `url` is `org/name[split]`, and `size` the size in Arrow format."""

    dataset: Any
    repository: Repository  # with the commit that was read


def load(repository: Repository, split: str, subset: str | None) -> HubSource:
    """Download and prepare one split of a dataset, or open its cached copy.

    Columns that are neither text nor numbers, such as images, are left out.

    Args:
        split: name of the split, or a slice of it such as "train[:10%]".
        subset: name of the configuration; None if the dataset has only one, or a default.

    Raises:
        UserError: if the dataset cannot be downloaded and has no cached copy, lacks the subset or the split, or is not
            text.
    """
    import datasets  # here, because the import takes seconds
    from huggingface_hub.errors import LocalEntryNotFoundError

    start = f"There is no file or folder {repository}, and"
    reason = hub.unreachable(repository, "dataset")
    try:
        with _offline() if reason else nullcontext():
            builder = datasets.load_dataset_builder(repository.id, subset, revision=repository.revision)
    except (ConnectionError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{start} no cached copy of the hub's dataset {repository} ({reason or _sentence(error)}); prepare the "
            "data on a machine with access, set HF_HOME to the cache of such a machine, or give a path."
        ) from None
    except ValueError as error:
        raise UserError(
            f"The dataset {repository} cannot be opened{f' with --subset {subset}' if subset else ''} "
            f"({_sentence(error)}); choose another --subset, or another dataset."
        ) from None
    except Exception as error:  # errors of datasets, of the network and of parsers have no common class
        raise UserError(
            f"{start} the hub's dataset {repository} cannot be read ({_sentence(error)}); correct the name, set "
            "HF_TOKEN if access is restricted, or give a path."
        ) from None
    module = type(builder).__module__.rpartition(".")[2]
    require(
        module in _BUILDERS,
        f"The dataset {repository} is in the format {module}, which is not read; name a dataset in one of the formats "
        f"{', '.join(_BUILDERS[:-1])}.",
    )
    # The cached copy is the newest one, of any revision. Its hash is the commit.
    require(
        module != _CACHED or repository.revision in (None, builder.hash),
        f"The hub cannot be reached, and the cached copy of the dataset {repository.id} is of commit {builder.hash}; "
        f"name that commit instead of '{repository.revision}', or prepare the data with access to the hub.",
    )
    try:
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split)
        dataset = dataset.select_columns([name for name, feature in dataset.features.items() if _is_text(feature)])
    except Exception as error:
        raise UserError(
            f"The split {split} of the dataset {repository} cannot be prepared ({_sentence(error)}); choose another "
            "--split, or another dataset."
        ) from None
    origin = Repository(repository.id, builder.hash)
    cached = f" from the cache ({reason})" if reason else ""
    hub.announce(f"Reading the split {split} of the dataset {origin} of the Hugging Face hub{cached}.")
    version = builder.hash or ""
    return HubSource(f"{repository}[{split}]", dataset.data.nbytes, version, dataset, origin)


@contextmanager
def _offline() -> Iterator[None]:
    """Make the library `datasets` read its cache at once, without requests to the hub or warnings."""
    import datasets
    from datasets.utils import logging

    offline, verbosity = datasets.config.HF_HUB_OFFLINE, logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)


def _is_text(feature: Any) -> bool:
    """Return whether a column holds text, numbers, or lists and structures of these."""
    from datasets.features import ClassLabel, Json, LargeList, List, Value

    if isinstance(feature, dict):
        return all(map(_is_text, feature.values()))
    return (
        _is_text(feature.feature)
        if isinstance(feature, List | LargeList)
        else isinstance(feature, ClassLabel | Json | Value)
    )


def _sentence(error: Exception) -> str:
    """Return an error's message in one line of limited length, without its full stop."""
    return " ".join(str(error).split())[:_LENGTH].rstrip(".") or type(error).__name__


def rows(segment: Segment) -> Iterator[Row]:
    """Yield rows of a dataset; a row that cannot be decoded has a `problem` and no values.

    Args:
        segment: of a `HubSource`; its range is one of rows.
    """
    source = segment.source
    assert isinstance(source, HubSource)
    end = len(source.dataset) if segment.end is None else segment.end
    total, done = max(end - segment.start, 1), 0
    for start in range(segment.start, end, _BATCH):
        for row in _rows(source, start, min(start + _BATCH, end)):
            done += 1
            yield replace(row, offset=segment.size * done // total)


def _rows(source: HubSource, start: int, end: int) -> Iterator[Row]:
    try:
        columns = source.dataset[start:end]
    except Exception as error:  # such as text that is not UTF-8
        if end - start == 1:
            yield Row(f"{source.url}:{end}", {}, one_line(error))
            return
        for row in range(start, end):
            yield from _rows(source, row, row + 1)
        return
    for row in range(end - start):
        yield Row(f"{source.url}:{start + row + 1}", {name: values[row] for name, values in columns.items()})
