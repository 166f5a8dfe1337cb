"""Validation of a folder's index.json, which is untrusted, before streaming opens it.

streaming writes and deletes the files that an index names, at any path, and decodes columns with any encoding that it
names, pickle included.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError
from memdlm_dist.runtime.storage import Storage

INDEX = "index.json"
# Column -> pattern of the MDS encodings that `ShardWriter` writes.
_ENCODINGS = {"tokens": r"ndarray:uint(16|32)(:\d+)?", "maskable": "bytes", "documents": "bytes"}
_KEYS = {
    "column_encodings", "column_names", "column_sizes", "compression", "format", "hashes", "raw_data", "samples",
    "size_limit", "version", "zip_data",
}  # fmt: skip


def prepare(location: str, folder: str, remote: bool) -> list[dict[str, Any]]:
    """Check the index of a folder of shards, after downloading it from a URL if it is not cached.

    Args:
        location: path or URL of the shards.
        folder: streaming's local folder: the path itself, or the cache.
        remote: whether `location` is a URL.

    Returns:
        The index entry of each shard.

    Raises:
        UserError: if the index cannot be read, or contains anything that no preparation writes.
    """
    path = Path(folder, INDEX)
    download = remote and not path.exists()
    try:
        content = Storage(location).read(INDEX) if remote else path.read_bytes()
        stale = remote and not download and path.read_bytes() != content
        shards = json.loads(content)["shards"]
        problem = next(filter(None, (_problem(shard, folder, remote) for shard in shards)), "")
    except Exception as error:  # each remote file system has different error classes
        detail = f"{type(error).__name__}: {error}".rstrip(".")
        raise UserError(f"The index {location}/{INDEX} cannot be read ({detail}); prepare the data anew.") from None
    if stale:
        raise UserError(f"The cache {folder} holds other shards than {location}, which has changed; delete the folder.")
    if problem:
        where = f"The index {path}" + (f" of {location}" if remote else "")
        raise UserError(f"{where} {problem}, which no preparation writes; use shards whose origin you know.")
    if download:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(content)
        partial.replace(path)
    return list(shards)


def _problem(shard: dict[str, Any], folder: str, remote: bool) -> str:
    """Return what is wrong with a shard's entry, as a predicate such as "names the format 'json'"; empty if valid."""
    if unknown := sorted(shard.keys() - _KEYS):
        return f"has the key {unknown[0]!r}"
    if shard["format"] != "mds":
        return f"names the format {shard['format']!r}"
    for name, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
        if not re.fullmatch(_ENCODINGS.get(name, "(?!)"), encoding):
            return f"names a column {name!r} of encoding {encoding!r}"
    # With compression, streaming deletes decompressed files that it did not create; in a local folder they may be the
    # user's.
    if shard["compression"] and not remote:
        return f"names the compression {shard['compression']!r}"
    for key in ("raw_data", "zip_data"):
        if shard[key] is not None and not _is_inside(shard[key]["basename"], folder):
            return f"names the file {shard[key]['basename']!r} outside of its folder"
    return ""


def _is_inside(name: str, folder: str) -> bool:
    """Return whether `name` is a plain relative path that is inside `folder` after resolving links."""
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return False
    root = os.path.realpath(folder)
    return os.path.realpath(os.path.join(root, name)).startswith(root + os.sep)
