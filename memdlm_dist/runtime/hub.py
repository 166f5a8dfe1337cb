"""Repositories of the Hugging Face hub, written `org/name` or `org/name@revision` in place of a folder.

`huggingface_hub` downloads them to its cache and reads its own environment: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_TOKEN. Only the files of a selection are downloaded: safetensors, tokenizers and descriptions, never pickles.
"""

import json
import os
import re
import sys
from collections import Counter
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from memdlm_dist.errors import UserError, require
from memdlm_dist.runtime.rank_0 import is_rank_0, one_line

_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# Suffixes of names that are files, not repositories; in lower case.
_FILES = (
    ".json", ".jsonl", ".jsonlines", ".ndjson", ".parquet", ".pq", ".arrow", ".feather", ".avro", ".orc", ".mds",
    ".txt", ".text", ".csv", ".tsv", ".xlsx", ".md", ".html", ".xml", ".pdf", ".yaml", ".yml", ".toml", ".ini", ".cfg",
    ".py", ".ipynb", ".sh", ".jinja", ".log", ".db", ".sqlite", ".safetensors", ".model", ".bin", ".pt", ".pth",
    ".ckpt", ".distcp", ".gguf", ".onnx", ".h5", ".npy", ".npz", ".pkl", ".pickle", ".gz", ".tgz", ".bz2", ".xz",
    ".zst", ".lz4", ".zip", ".tar", ".7z", ".rar",
)  # fmt: skip
# Seconds until an unanswered request means that there is no access to the hub.
_PROBE = 10.0
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
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"  # files of PEFT


def parse(name: str) -> Repository | None:
    """Return the repository that `name` denotes; None for a path, and for a name that no repository has.

    A name is a path if its first part is a folder, or if it has the suffix of a file.
    """
    repository = _named(name)
    return None if repository is None or _is_path(name) else repository


def _named(name: str) -> Repository | None:
    """Return the repository that `name` can denote on some machine."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in name or name.lower().endswith(_FILES) or match[1].lower().endswith(_FILES):
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return Repository(match[1], match[2])


def _is_path(name: str) -> bool:
    return os.path.isdir(name.partition("/")[0])


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


def adapter(name: str) -> str:
    """Return the folder of an adapter in PEFT's format, like `tokenizer`.

    Raises:
        UserError: if the repository cannot be downloaded and has no cached copy, or has no adapter in safetensors.
    """
    return _fetch(name, _Selection((ADAPTER_CONFIG, ADAPTER_TENSORS), ADAPTER_TENSORS))


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


def unreachable(repository: Repository, repo_type: str) -> str | None:
    """Return the reason why the hub does not answer requests; None if it answers, even if it refuses.

    The libraries repeat a failed request, and wait for minutes.

    Args:
        repo_type: "model" or "dataset".
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(repository.id, revision=repository.revision, repo_type=repo_type, timeout=_PROBE)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return one_line(error) if error.response is not None and error.response.status_code >= 500 else None
    except Exception as error:  # the messages of connection errors are long
        return f"{constants.ENDPOINT} cannot be reached, {type(error).__name__}"
    return None


@cache
def announce(line: str) -> None:
    """Print a line about data from the hub to standard error, once, on rank 0; commands suppress the log."""
    if is_rank_0():
        print(line, file=sys.stderr, flush=True)


def _fetch(name: str, selection: _Selection) -> str:
    repository = _named(name)
    if repository is None:
        return name
    folder = _once_per_node(name, repository, selection)
    if folder is None:
        return name
    announce(f"Reading the repository {repository} of the Hugging Face hub from {folder}.")
    return folder


def _download(repository: Repository, selection: _Selection) -> str:
    from huggingface_hub import snapshot_download

    reason = unreachable(repository, "model")
    try:
        folder: str = snapshot_download(
            repository.id,
            revision=repository.revision,
            allow_patterns=list(selection.patterns),
            ignore_patterns=["*/*"],  # a pattern also matches names in subfolders
            local_files_only=reason is not None,
        )
    except Exception as error:  # errors of requests, of the store Xet and of the disk have no common class
        raise UserError(_failure(repository, error, reason)) from None
    if selection.required and not any(Path(folder).glob(selection.required)):
        raise UserError(
            f"The copy of the repository {repository} in {folder} has no file {selection.required}; download the "
            "repository again with access to the hub, or name another one."
        )
    return folder


def _failure(repository: Repository, error: Exception, reason: str | None) -> str:
    """Return one sentence for a failed download; `reason` is the result of `unreachable`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    start = f"There is no folder {repository}, and"
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
        reason = reason or one_line(error.__cause__ or error)
        return (
            f"{start} no cached copy of the hub's repository {repository} ({reason}); download it on a machine with "
            "access, set HF_HOME to the cache of such a machine, or give a path."
        )
    return (
        f"{start} the hub's repository {repository} cannot be downloaded ({type(error).__name__}: {one_line(error)}); "
        "correct the cause, or give a path."
    )


_calls: Counter[str] = Counter()  # name -> exchanges about it


@cache  # rank 0 may host the store's server, which ends with the last reference
def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))[0]


def _once_per_node(name: str, repository: Repository, selection: _Selection) -> str | None:
    """Download on the first rank of each node, and return the folder once all nodes have finished.

    The other ranks would wait for the library's file locks, but each would ask the hub for the list of files. Ranks
    wait for each other in the rendezvous store, so that no time-out of a collective limits a download.

    Returns:
        The folder; None if `name` is a path on all nodes.

    Raises:
        UserError: on all ranks, if a node fails, if the path exists on some nodes only, or if the nodes have
            different revisions.
    """
    # Some clusters set WORLD_SIZE in every shell; LOCAL_RANK means that a launcher started this process.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return None if _is_path(name) else _download(repository, selection)
    node, downloads = int(os.environ.get("GROUP_RANK", "0")), os.environ["LOCAL_RANK"] == "0"
    # A path may exist on some nodes only, so that all ranks take part for any name of this form.
    states = _exchange(name, {"exists": os.path.exists(name), "path": _is_path(name)} if downloads else None)
    exists, paths = [state["exists"] for state in states], [state["path"] for state in states]
    if len(set(exists)) > 1:
        raise UserError(
            f"Node {exists.index(False)} lacks the folder {name}, which node {exists.index(True)} has; copy it to all "
            "nodes."
        )
    if len(set(paths)) > 1:
        parent = name.partition("/")[0]
        raise UserError(
            f"Node {paths.index(False)} lacks the folder {parent}, which node {paths.index(True)} has, and no node has "
            f"{name}; correct the path, or start without {parent} to read a repository of the hub."
        )
    if paths[node]:
        return None
    outcome: dict[str, str] | None = None
    if downloads:
        try:
            outcome = {"folder": _download(repository, selection)}
        except UserError as error:
            outcome = {"error": str(error)}
    outcomes = _exchange(name, outcome)
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


def _exchange(name: str, value: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the values of all nodes about a name; the ranks of a node that have none pass None."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    node, nodes = os.environ.get("GROUP_RANK", "0"), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    store = _store()
    key = f"hub/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}/{_calls[name]}"
    _calls[name] += 1
    if value is not None:
        store.set(f"{key}/{node}", json.dumps(value))
    keys = [f"{key}/{other}" for other in range(nodes)]
    store.wait(keys, _PATIENCE)
    values = [json.loads(store.get(each)) for each in keys]
    store.set(f"{key}/read by {rank}", "")
    if rank == 0:  # it may host the store's server, and may end with an error
        store.wait([f"{key}/read by {other}" for other in range(world_size)], _PATIENCE)
    return values
