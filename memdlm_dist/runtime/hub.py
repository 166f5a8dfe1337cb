"""Repositories of the Hugging Face hub, written `org/name` or `org/name@revision` in place of a folder.

`huggingface_hub` downloads them to its cache and reads its own environment: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_TOKEN. Only the files of a selection are downloaded: safetensors, tokenizers and descriptions, never pickles.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import one_line

logger = logging.getLogger()

_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# Suffixes of names that are files, not repositories.
_FILES = (
    ".json", ".jsonl", ".ndjson", ".parquet", ".pq", ".txt", ".csv", ".tsv", ".md", ".py", ".toml", ".safetensors",
    ".bin", ".pt", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar",
)  # fmt: skip
# Seconds that ranks wait for the download of their node and of the others.
_PATIENCE = timedelta(days=1)


class Repository(NamedTuple):
    """Repository of the hub, and a branch, tag or commit in it; None stands for the main branch."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


class _Selection(NamedTuple):
    """Files of a repository: patterns of their names, and the pattern that at least one file must match."""

    patterns: tuple[str, ...]
    required: str = ""


_TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "config.json",
)  # fmt: skip
_DESCRIPTION_FILES = (
    *_TOKENIZER_FILES, "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model", "LICENSE*",
    "*.py",  # only copied to exports, never run
)  # fmt: skip
_WEIGHT_FILES = (*_DESCRIPTION_FILES, "*.safetensors", "*.safetensors.index.json")


def parse(name: str) -> Repository | None:
    """Return the repository that `name` denotes; None for an existing path, and for names that are no repository's."""
    match = _NAME.fullmatch(name)
    if match is None or os.path.lexists(name) or name.endswith(_FILES) or ".." in name:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return Repository(match[1], match[2])


def tokenizer(name: str) -> str:
    """Return the folder of a tokenizer: `name` itself, or the cached copy of the repository that it denotes.

    All functions here that return a folder are collective calls on several ranks. One rank of each node downloads.

    Raises:
        UserError: if the repository cannot be downloaded and has no cached copy, or has no tokenizer.json.
    """
    return _fetch(name, _Selection(_TOKENIZER_FILES, "tokenizer.json"))


def weights(name: str) -> str:
    """Return the folder of Hugging Face weights, like `tokenizer`.

    Raises:
        UserError: if the repository cannot be downloaded and has no cached copy, or has no safetensors.
    """
    folder = _fetch(name, _Selection(_WEIGHT_FILES, "*.safetensors"))
    # Another program may have downloaded more files. The metadata of a torch checkpoint is a pickle.
    require(
        folder == name or not os.path.lexists(os.path.join(folder, ".metadata")),
        f"The repository {name} holds a torch checkpoint (.metadata), which is read from trusted folders only; name "
        "a repository of Hugging Face weights.",
    )
    return folder


def description(name: str) -> str:
    """Return the folder of a model's config.json, tokenizer and code, like `tokenizer`; without the weights.

    Raises:
        UserError: if the repository cannot be downloaded and has no cached copy.
    """
    return _fetch(name, _Selection(_DESCRIPTION_FILES))


def origin(folder: str) -> Repository | None:
    """Return the repository and the commit of a folder in the hub's cache; None for other folders."""
    match = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/([^/]+)/?$", folder)
    return Repository(f"{match[1]}/{match[2]}", match[3]) if match else None


def _fetch(name: str, selection: _Selection) -> str:
    repository = parse(name)
    if repository is None:
        return name
    folder = _once_per_node(lambda: _download(repository, selection), repository)
    logger.info(f"Reading the repository {repository} from {folder}.")
    return folder


def _download(repository: Repository, selection: _Selection) -> str:
    from huggingface_hub import snapshot_download

    try:
        folder: str = snapshot_download(
            repository.id,
            revision=repository.revision,
            allow_patterns=list(selection.patterns),
            ignore_patterns=["*/*"],  # a pattern also matches names in subfolders
        )
    except Exception as error:  # errors of requests, of the store Xet and of the disk have no common class
        raise UserError(_failure(repository, error)) from None
    if selection.required and not any(Path(folder).glob(selection.required)):
        raise UserError(
            f"The copy of the repository {repository} in {folder} has no file {selection.required}; download the "
            "repository again with access to the hub, or name another one."
        )
    return folder


def _failure(repository: Repository, error: Exception) -> str:
    """Return one sentence for a failed download."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    start, cause = f"There is no folder {repository}, and", error.__cause__
    if isinstance(error, GatedRepoError):
        return (
            f"{start} the hub's repository {repository.id} is gated; ask for access on its page, and set HF_TOKEN to "
            "your token."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{start} the hub's repository {repository.id} has no revision '{repository.revision}'; correct it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{start} the hub has no repository {repository.id} that is public or that HF_TOKEN may read; correct the "
            "name, or set HF_TOKEN to your token."
        )
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(cause, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(cause, HfHubHTTPError):
            reason = one_line(cause)
        else:  # the messages of connection errors are long
            reason = f"{constants.ENDPOINT} cannot be reached, {type(cause or error).__name__}"
        return (
            f"{start} no cached copy of the hub's repository {repository} ({reason}); download it on a machine with "
            "access, set HF_HOME to the cache of such a machine, or give a path."
        )
    return (
        f"{start} the hub's repository {repository} cannot be downloaded ({type(error).__name__}: {one_line(error)}); "
        "correct the cause, or give a path."
    )


_calls = count()


@cache  # rank 0 may host the store's server, which ends with the last reference
def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))[0]


def _once_per_node(download: Callable[[], str], repository: Repository) -> str:
    """Run `download` on the first rank of each node, and return its folder once all nodes have finished.

    The other ranks would wait for the library's file locks, but each would ask the hub for the list of files. Ranks
    wait for each other in the rendezvous store, so that no time-out of a collective limits a download.

    Raises:
        UserError: on all ranks, if a node fails, or if the nodes have different revisions.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return download()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    node, nodes = int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    store = _store()
    key = f"hub/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_calls)}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            outcome = {"folder": download()}
        except UserError as error:
            outcome = {"error": str(error)}
        store.set(f"{key}/{node}", json.dumps(outcome))
    keys = [f"{key}/{other}" for other in range(nodes)]
    store.wait(keys, _PATIENCE)
    outcomes = [json.loads(store.get(name)) for name in keys]
    store.set(f"{key}/read by {rank}", "")
    if rank == 0:  # it may host the store's server, and may end with an error
        store.wait([f"{key}/read by {other}" for other in range(world_size)], _PATIENCE)
    for outcome in outcomes:
        if "error" in outcome:
            raise UserError(outcome["error"])
    revisions = {os.path.basename(outcome["folder"]) for outcome in outcomes}
    require(
        len(revisions) == 1,
        f"The nodes have different revisions of the repository {repository} ({', '.join(sorted(revisions))}); name one "
        f"of them: {repository.id}@REVISION.",
    )
    return str(outcomes[node]["folder"])
