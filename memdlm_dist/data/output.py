"""Folders that a preparation makes: they take their places together, and no file is removed that it did not write."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError
from memdlm_dist.runtime.preemption import deferring_signals

# Lists the files of a complete folder; in one that is being written, the list is null.
MANIFEST = "memdlm_files.json"
CARD = "memdlm.json"
INDEX = "index.json"
TOKENIZER = "tokenizer"
PARTS = ("train", "heldout")
SUMMARY = "summary.json"

_TOKENIZER_FILES = r"(tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja"
_SHARD_FILES = r"(index|memdlm)\.json|shard\.\d{5,}\.mds"
# Folder -> the names that a preparation gives to files in it.
_NAMES = {TOKENIZER: _TOKENIZER_FILES, **dict.fromkeys(PARTS, _SHARD_FILES)}


def begin(folder: Path) -> None:
    """Mark a new folder as one that a preparation is writing."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, None)


def check(output: Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Check that the folders `names` of `output` can be written, and replaced without anybody's loss.

    Raises:
        UserError: naming the first file or folder that stands in the way.
    """
    summary = output / SUMMARY
    if summary.is_symlink() or (summary.exists() and not _read(summary).keys() >= {"rows", "sequences", "problems"}):
        raise UserError(f"{summary} was written by no preparation; choose another --output.")
    for name in names:
        folder = output / name
        places = (folder, _partial(folder), _replaced(folder))
        for path in places:
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                kind = "a symbolic link" if path.is_symlink() else "a file"
                raise UserError(f"{path} is {kind}, not a folder; remove it or choose another --output.")
        if not overwrite and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --output or pass --overwrite to replace it.")
        for path in places:
            if path.exists() and (foreign := _foreign_file(path, _NAMES[name])):
                raise UserError(f"{path} holds {foreign}, which no preparation wrote; choose another --output.")
    if summary.exists() and not overwrite:
        raise UserError(f"{summary} is there already; choose another --output or pass --overwrite to replace it.")


@contextlib.contextmanager
def replacing(output: Path, names: tuple[str, ...]) -> Iterator[dict[str, Path]]:
    """Give a path for each folder, which takes the folder's place once the context is left without an error.

    The caller makes the folders, and calls `begin` on each before it writes to it. After an error nothing of them
    stays, and the folders in `output` are untouched.

    Raises:
        UserError: if a folder cannot be replaced without anybody's loss; see `check`.
    """
    check(output, names, overwrite=True)
    partial = {name: _partial(output / name) for name in names}
    for name, path in partial.items():  # of a preparation that was killed
        _remove(path, _NAMES[name])
    try:
        yield partial
        for name, path in partial.items():
            _write_manifest(path, sorted(p.name for p in path.iterdir() if re.fullmatch(_NAMES[name], p.name)))
        check(output, names, overwrite=True)  # a preparation takes hours
    except BaseException:
        for name, path in partial.items():
            _remove(path, _NAMES[name])
        raise
    with deferring_signals():
        _swap(output, partial)


def recover(output: Path) -> None:
    """Finish what a preparation was killed in when all was written and folders were changing places."""
    partial = {name: path for name in _NAMES if (path := _partial(output / name)).is_dir() and not path.is_symlink()}
    if partial and all(_is_complete(path, _NAMES[name]) for name, path in partial.items()):
        _swap(output, partial)
    for name, names in _NAMES.items():
        if (output / name).exists():
            _remove(_replaced(output / name), names)


def _swap(output: Path, partial: dict[str, Path]) -> None:
    """Put complete folders in their places: by renames alone, and what they replace is removed when all are there."""
    for name, path in partial.items():
        if (output / name).exists():
            (output / name).rename(_replaced(output / name))
        path.rename(output / name)
    for name in partial:
        _remove(_replaced(output / name), _NAMES[name])


def _is_complete(folder: Path, names: str) -> bool:
    return _listed(folder) is not None and _foreign_file(folder, names) is None


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def _write_manifest(folder: Path, files: list[str] | None) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def _foreign_file(folder: Path, names: str) -> str | None:
    """Return the name of something in a folder that is no file of a preparation."""
    written = _written(folder, names)
    entries = sorted(folder.iterdir())
    return next((p.name for p in entries if p.name not in written or p.is_symlink() or not p.is_file()), None)


def _written(folder: Path, names: str) -> set[str]:
    """Return the names of a folder's files that a preparation wrote."""
    fitting = {path.name for path in folder.iterdir() if re.fullmatch(names, path.name)}
    if (folder / MANIFEST).is_file():
        files = _listed(folder)
        return {MANIFEST} | (fitting if files is None and _is_begun(folder) else fitting & set(files or ()))
    # Folders of memdlm_dist 0.1 have no manifest: an index names its shards, and a tokenizer stands beside shards.
    if names == _TOKENIZER_FILES:
        return fitting if (folder.parent / "train" / CARD).is_file() else set()
    if not (folder / CARD).is_file():
        return set()
    try:
        shards = {shard["raw_data"]["basename"] for shard in _read(folder / INDEX).get("shards", [])}
    except (TypeError, KeyError):
        shards = set()
    return fitting & {CARD, INDEX, *shards}


def _listed(folder: Path) -> list[str] | None:
    """Return the files that a folder's manifest lists; None if it lists none."""
    files = _read(folder / MANIFEST).get("files")
    return files if isinstance(files, list) and all(isinstance(name, str) for name in files) else None


def _is_begun(folder: Path) -> bool:
    """Return whether a preparation has begun to write a folder, and has not come to its end."""
    return _read(folder / MANIFEST) == {"files": None}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(folder: Path, names: str) -> None:
    """Remove a preparation's files, and the folder if nothing else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    # What tells whose files these are goes last: a removal that is cut short can be taken up again.
    written = _written(folder, names)
    for name in sorted(written, key=(INDEX, CARD, MANIFEST).__contains__):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
