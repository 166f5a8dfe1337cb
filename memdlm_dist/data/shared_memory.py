"""streaming's shared memory: what a killed run leaves, and two nodes of one run that are the same machine.

What a killed run leaves makes streaming refuse the same cache folder afterwards. streaming can clear all shared memory
of the node, which would take it from other live jobs too. Here only that of our own folders is removed, and only if no
process has it mapped.
"""

import glob
import logging
import os
import time
import zlib
from collections.abc import Collection
from pathlib import Path

from memdlm_dist.compat import streaming
from memdlm_dist.errors import UserError

logger = logging.getLogger()

SHARED_MEMORY = "/dev/shm"
# A killed rank's loader workers notice within 5 s that they are alone.
PATIENCE = 30.0


def remove_leftovers(folders: Collection[str], cached: Collection[str]) -> None:
    """Remove the shared memory of ended processes that served some of these folders.

    Args:
        folders: of all streams, as streaming registers them.
        cached: those among them that hold copies of a remote: no other live job may use these.

    Raises:
        UserError: if another live job uses one of `cached`.
    """
    deadline = time.monotonic() + PATIENCE
    for registration in sorted(glob.glob(f"{SHARED_MEMORY}/*_{streaming.REGISTRATION}")):
        number = os.path.basename(registration).removesuffix(streaming.REGISTRATION)
        theirs = _folders(registration)
        if not theirs & set(folders):
            continue
        users = _users(number)
        while users and theirs & set(cached) and time.monotonic() < deadline:
            time.sleep(0.5)
            users = _users(number)
        if users and theirs & set(cached):
            raise UserError(
                f"Another job (process {min(users)}) uses the cache folder {min(theirs & set(cached))}; give this run "
                "another data.cache_folder, or end that job."
            )
        if not users:
            logger.info(f"Removing shared memory of an earlier run that was killed ({registration}).")
            for path in (*map(Path, glob.glob(f"{SHARED_MEMORY}/{number}*")), *streaming.lock_files(number)):
                path.unlink(missing_ok=True)


def number_by_run() -> None:
    """Let each node of each run number its shared memory from another place.

    streaming takes the first free number: two runs that start together, or two nodes on one machine, take the same one.
    """
    run = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"))
    streaming.start_prefixes_at(zlib.crc32(run.encode()) % 10_000 * 100_000)


def _folders(registration: str) -> set[str]:
    """The folders that a registration names; none if it is not ours to read or was just removed."""
    try:
        return set(streaming.registered_folders(Path(registration).read_bytes()))
    except (OSError, ValueError, IndexError):
        return set()


def _users(number: str) -> set[int]:
    """The processes that have shared memory of a number mapped, this one apart."""
    users = set()
    for maps in glob.glob("/proc/[0-9]*/maps"):
        process = int(maps.split("/")[2])
        try:
            if process != os.getpid() and f"{SHARED_MEMORY}/{number}" in Path(maps).read_text():
                users.add(process)
        except OSError:  # it ended, or is another user's
            continue
    return users
