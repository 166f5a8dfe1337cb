"""Progress of a preparation over all units: a bar in a terminal, a line a minute elsewhere."""

import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from memdlm_dist.data.preparation.jobs import RUNNING

_REFRESH, _LINE = 0.5, 60.0  # seconds


class Progress:
    """Progress over the stored bytes of all units, from finished units and from the marks of those in progress.

    Args:
        label: what is done.
        total: bytes to read.
        scratch: folder of the marks, see `jobs.ProgressMark`.
    """

    def __init__(self, label: str, total: int, scratch: str):
        self._label, self._total, self._folder = label, total, Path(scratch, RUNNING)
        self._done = self._bad_rows = 0
        self._earlier = 0  # bytes of units that were finished by an earlier command
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=not sys.stderr.isatty())
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def finish_unit(self, size: int, bad_rows: int, earlier: bool = False) -> None:
        """Count a finished unit; one that an earlier command had finished does not enter the speed."""
        self._done += size
        self._bad_rows += bad_rows
        self._earlier += size * earlier

    def _watch(self) -> None:
        last_line = time.monotonic()
        while not self._ended.wait(_REFRESH):
            if not self._bar.disable:
                self._refresh()
            elif time.monotonic() > last_line + _LINE:
                last_line = time.monotonic()
                print(self.line(), file=sys.stderr, flush=True)

    def _refresh(self) -> None:
        done, bad_rows = self._count()
        self._bar.n = done
        self._bar.set_postfix({"bad rows": bad_rows}, refresh=False)
        self._bar.refresh()

    def _count(self) -> tuple[int, int]:
        """Return the bytes and the bad rows read so far."""
        done, bad_rows = self._done, self._bad_rows
        for mark in self._folder.glob("*"):
            try:
                offset, bad = map(int, mark.read_text().split())
            except (OSError, ValueError):  # just finished, or being written
                continue
            done, bad_rows = done + offset, bad_rows + bad
        return min(done, self._total), bad_rows

    def line(self) -> str:
        """Return the progress as a line of a log."""
        done, bad_rows = self._count()
        rate = max(done - self._earlier, 0) / max(time.monotonic() - self._began, 1e-9)
        left = f"{_duration((self._total - done) / rate)} left" if rate else "no estimate yet"
        return (
            f"{self._label}: {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left}, "
            f"{bad_rows:,} bad rows"
        )

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if not self._bar.disable:
            self._refresh()
        self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
