"""Output folders of a preparation: replaced together, without removing a file that no preparation wrote."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError
from memdlm_dist.runtime.preemption import deferring_signals

# Lists the files of a complete folder. While the folder is being written, the list is null.
MANIFEST = "memdlm_files.json"
CARD = "memdlm.json"
INDEX = "index.json"
LENGTHS = "lengths.npy"
TOKENIZER = "tokenizer"
SPLITS = ("train", "heldout")
SUMMARY = "summary.json"

_TEMPORARY = r"\.\d+\.tmp"  # end of the name of a file that is being written, see `Storage`
_TOKENIZER_FILES = rf"((tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template\.jinja)({_TEMPORARY})?"
_PART = r"\d{6,}-\d{4,}"
# Shards are in one folder for each part of a unit; those of earlier versions are next to the index.
_SHARD_FILES = rf"((index|memdlm)\.json|lengths\.npy|({_PART}/)?shard\.\d{{5,}}\.mds)({_TEMPORARY})?"
# Folder -> pattern of the names of the files that a preparation writes to it.
_FILE_PATTERNS = {TOKENIZER: _TOKENIZER_FILES, **dict.fromkeys(SPLITS, _SHARD_FILES)}


def begin(folder: Path) -> None:
    """Create a folder and mark it as being written by a preparation."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, None)


def check(output: Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Check that the folders `names` in `output` can be written or replaced without losing a file of the user.

    Raises:
        UserError: naming the first file or folder that prevents it.
    """
    summary = output / SUMMARY
    if summary.is_symlink() or (summary.exists() and not _read(summary).keys() >= {"rows", "sequences", "problems"}):
        raise UserError(f"{summary} exists, but no preparation wrote it; choose another --output.")
    for name in names:
        folder = output / name
        paths = (folder, _partial_path(folder), _old_path(folder))
        for path in paths:
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                kind = "a symbolic link" if path.is_symlink() else "a file"
                raise UserError(f"{path} is {kind}, not a folder; remove it or choose another --output.")
        if not overwrite and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --output or pass --overwrite to replace it.")
        for path in paths:
            if path.exists() and (foreign := _foreign_file(path, _FILE_PATTERNS[name])):
                raise UserError(f"{path} holds {foreign}, which no preparation wrote; choose another --output.")
    if summary.exists() and not overwrite:
        raise UserError(f"{summary} exists already; choose another --output or pass --overwrite to replace it.")


def replace(output: Path, names: tuple[str, ...]) -> None:
    """Replace folders by their staged versions, see `staged_name`, which hold all files.

    Raises:
        UserError: if a folder cannot be replaced without losing a file of the user; see `check`.
    """
    check(output, names, overwrite=True)  # again, because a preparation takes hours
    partial = {name: _partial_path(output / name) for name in names}
    with deferring_signals():
        for name, path in partial.items():
            files = [file for file in _files(path) if re.fullmatch(_FILE_PATTERNS[name], file)]
            unfinished = {file for file in files if re.search(rf"{_TEMPORARY}$", file)}  # left by a killed command
            for file in unfinished:
                (path / file).unlink()
            _write_manifest(path, sorted({*files} - unfinished))
        _replace_folders(output, partial)


def is_part(name: str) -> bool:
    """Return whether a preparation makes a folder of this name for shards."""
    return re.fullmatch(_PART, name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Return whether a preparation writes a file of this name to the folder of the tokenizer."""
    return re.fullmatch(_TOKENIZER_FILES, name) is not None


def staged_name(name: str) -> str:
    """Return the name of the folder in which the new version of a folder is written."""
    return _partial_path(Path(name)).name


def discard(output: Path) -> None:
    """Remove the staged folders of an unfinished preparation."""
    for name, pattern in _FILE_PATTERNS.items():
        _remove(_partial_path(output / name), pattern)


def recover(output: Path) -> None:
    """Finish a preparation that was killed while it was replacing folders, after all files had been written."""
    partial = {
        name: path
        for name in _FILE_PATTERNS
        if (path := _partial_path(output / name)).is_dir() and not path.is_symlink()
    }
    if partial and all(_is_complete(path, _FILE_PATTERNS[name]) for name, path in partial.items()):
        _replace_folders(output, partial)
    for name, pattern in _FILE_PATTERNS.items():
        if (output / name).exists():
            _remove(_old_path(output / name), pattern)


def _replace_folders(output: Path, partial: dict[str, Path]) -> None:
    """Replace folders by complete ones, by renaming alone; remove the old ones after all have been replaced."""
    for name, path in partial.items():
        if (output / name).exists():
            (output / name).rename(_old_path(output / name))
        path.rename(output / name)
    for name in partial:
        _remove(_old_path(output / name), _FILE_PATTERNS[name])


def _is_complete(folder: Path, pattern: str) -> bool:
    return _manifest_files(folder) is not None and _foreign_file(folder, pattern) is None


def _partial_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _old_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def _write_manifest(folder: Path, files: list[str] | None) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def _foreign_file(folder: Path, pattern: str) -> str | None:
    """Return the first file or link in a folder that no preparation wrote; None if there is none."""
    prepared = _prepared_files(folder, pattern)
    folders = {str(Path(name).parent) for name in prepared} | _empty_parts(folder)
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")):
        path = folder / name
        is_ours = (name in prepared and path.is_file()) or (name in folders and path.is_dir())
        if not is_ours or path.is_symlink():
            return name
    return None


def _empty_parts(folder: Path) -> set[str]:
    """Return the names of empty folders for shards, which a command makes that is killed before it writes a shard."""
    return {path.name for path in folder.iterdir() if re.fullmatch(_PART, path.name) and not _files(path)}


def _files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _prepared_files(folder: Path, pattern: str) -> set[str]:
    """Return the names of the files that a preparation wrote to a folder."""
    matching = {name for name in _files(folder) if re.fullmatch(pattern, name)}
    if (folder / MANIFEST).is_file():
        files = _manifest_files(folder)
        return {MANIFEST} | (matching if files is None and _is_being_written(folder) else matching & set(files or ()))
    # Folders of memdlm_dist 0.1 have no manifest. There the index names the shards, and train/ is next to tokenizer/.
    if pattern == _TOKENIZER_FILES:
        return matching if (folder.parent / "train" / CARD).is_file() else set()
    if not (folder / CARD).is_file():
        return set()
    try:
        shards = {shard["raw_data"]["basename"] for shard in _read(folder / INDEX).get("shards", [])}
    except (TypeError, KeyError):
        shards = set()
    return matching & {CARD, INDEX, *shards}


def _manifest_files(folder: Path) -> list[str] | None:
    """Return the file names in a folder's manifest; None if it has no valid list."""
    files = _read(folder / MANIFEST).get("files")
    return files if isinstance(files, list) and all(isinstance(name, str) for name in files) else None


def _is_being_written(folder: Path) -> bool:
    """Return whether a folder is marked as being written."""
    return _read(folder / MANIFEST) == {"files": None}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty dictionary if the file has none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(folder: Path, pattern: str) -> None:
    """Remove the files that a preparation wrote, and the folder if it is then empty."""
    if not folder.is_dir() or folder.is_symlink():
        return
    # Index, card and manifest, which identify the files, are removed last: an interrupted removal can be repeated.
    prepared = _prepared_files(folder, pattern)
    for name in sorted(prepared, key=(INDEX, CARD, MANIFEST).__contains__):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            (folder / name).unlink()
    for name in ({str(Path(name).parent) for name in prepared} - {"."}) | _empty_parts(folder):
        with contextlib.suppress(OSError):
            (folder / name).rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
