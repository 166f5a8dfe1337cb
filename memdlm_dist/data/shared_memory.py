"""Cleanup of streaming's shared memory, and prefixes that differ between runs and nodes on one machine.

streaming refuses a cache folder if a killed run left shared memory for it. streaming's own cleanup removes all shared
memory of the node, including that of other live jobs. `remove_leftovers` removes only the shared memory of the given
folders, and only if no process has mapped it.
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
# Seconds to wait for a killed run's processes. Loader workers of a killed rank end within 5 s.
PATIENCE = 30.0


def remove_leftovers(folders: Collection[str], cached: Collection[str]) -> None:
    """Remove shared memory for these folders whose processes have ended.

    Args:
        folders: the local folders of all streams, as streaming registers them.
        cached: the folders among them that cache a remote; another live job must not use them.

    Raises:
        UserError: if another live job uses one of `cached`.
    """
    deadline = time.monotonic() + PATIENCE
    for registration in sorted(glob.glob(f"{SHARED_MEMORY}/*_{streaming.REGISTRATION}")):
        prefix = os.path.basename(registration).removesuffix(streaming.REGISTRATION)
        registered = _folders(registration)
        if not registered & set(folders):
            continue
        users = _users(prefix)
        while users and registered & set(cached) and time.monotonic() < deadline:
            time.sleep(0.5)
            users = _users(prefix)
        if users and registered & set(cached):
            raise UserError(
                f"Another job (process {min(users)}) uses the cache folder {min(registered & set(cached))}; give this "
                "run another data.cache_folder, or end the other job."
            )
        if not users:
            logger.info(f"Removing shared memory of an earlier run that was killed ({registration}).")
            for path in (*map(Path, glob.glob(f"{SHARED_MEMORY}/{prefix}*")), *streaming.lock_files(prefix)):
                path.unlink(missing_ok=True)


def choose_prefix_by_run() -> None:
    """Start the prefixes of streaming's shared memory at a number that depends on the run and the node.

    streaming takes the first free prefix, so two runs that start together, or two nodes on one machine, would take the
    same one.
    """
    run = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"))
    if "MASTER_PORT" not in os.environ:  # a single process, such as a tool
        run = str(os.getpid())
    streaming.start_prefixes_at(zlib.crc32(run.encode()) % 10_000 * 100_000)


def _folders(registration: str) -> set[str]:
    """Return the folders that a registration names; empty if it cannot be read or was just removed."""
    try:
        return set(streaming.registered_folders(Path(registration).read_bytes()))
    except (OSError, ValueError, IndexError):
        return set()


def _users(prefix: str) -> set[int]:
    """Return the other processes that have mapped shared memory with this prefix."""
    users = set()
    for maps in glob.glob("/proc/[0-9]*/maps"):
        process = int(maps.split("/")[2])
        try:
            if process != os.getpid() and f"{SHARED_MEMORY}/{prefix}" in Path(maps).read_text():
                users.add(process)
        except OSError:  # the process has ended or is another user's
            continue
    return users
