"""Prefetch thread: loads the next step's micro-batches and draws their noise while the current step runs."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from memdlm_dist.data.loader import Batch
from memdlm_dist.method.micro_batch import MicroBatch
from memdlm_dist.method.trajectory import IGNORE_INDEX
from memdlm_dist.runtime import device as devices
from memdlm_dist.runtime.transfer import PinnedTree

# Seconds that closing waits for the thread. If its loader does not return, the process ends without it (daemon thread).
_CLOSE_TIMEOUT = 10.0


class _Closing(Exception):
    """Signal inside the thread that the prefetcher is closing."""


class PrefetchedBatch(NamedTuple):
    """A micro-batch with its noise drawn, on the host."""

    on_host: MicroBatch
    pinned: PinnedTree  # the micro-batch in pinned memory, for the copy to the device
    sample_ids_B: Tensor
    labelled: int  # number of tokens with a label
    tokens: int  # number of all tokens
    loader_position: dict[str, int]  # the loader's position after this micro-batch


class BatchPrefetcher:
    """Thread that loads batches, draws their noise and copies them to pinned memory, at most one step ahead.

    A context manager; leaving it ends the thread. `take` raises the errors of the thread.

    Args:
        loader: yields batches; only the thread reads it, from the first `take` on.
        draw: (batch, step) -> micro-batch with its noise.
        per_step: micro-batches per step.
        last_step: last step to prefetch.
        device: device of the micro-batches' later copy.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        draw: Callable[[Batch, int], MicroBatch],
        per_step: int,
        last_step: int,
        device: torch.device,
    ):
        self._loader, self._draw, self._per_step = loader, draw, per_step
        self._last_step, self._device = last_step, device
        self._steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # steps to load; None ends the thread
        self._loaded: queue.SimpleQueue[list[PrefetchedBatch] | BaseException] = queue.SimpleQueue()
        self._requested = 0  # the last step put into `_steps`
        self._needed = threading.Event()  # set while `take` waits, and when the prefetcher closes
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="prefetch")

    def __enter__(self) -> "BatchPrefetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._steps.put(None)
        self._needed.set()
        self._thread.join(_CLOSE_TIMEOUT)

    @property
    def thread(self) -> int:
        """Identifier of the thread, as in `threading.get_ident`; 0 before it starts."""
        return self._thread.ident or 0

    def take(self, step: int) -> list[PrefetchedBatch]:
        """Return the micro-batches of a step as soon as they are loaded, and request the next step's."""
        self._needed.set()
        if self._requested < step:
            self._steps.put(step)
        loaded = self._loaded.get()
        self._needed.clear()
        if isinstance(loaded, BaseException):
            raise loaded
        self._requested = step
        if step < self._last_step:
            self._requested = step + 1
            self._steps.put(self._requested)
        return loaded

    def wait_until_needed(self) -> None:
        """Block the prefetch thread until the main thread waits in `take`.

        The loader calls this before it forks worker processes: a waiting main thread holds no lock that they could
        inherit.
        """
        self._needed.wait()
        if self._closing:
            raise _Closing

    def _run(self) -> None:
        batches = None
        while (step := self._steps.get()) is not None:
            try:
                if batches is None:
                    devices.use(self._device)
                    batches = iter(self._loader)
                self._loaded.put(self._load(batches, step))
            except BaseException as error:  # raised by `take`
                self._loaded.put(error)
                return

    def _load(self, batches: Iterator[Batch], step: int) -> list[PrefetchedBatch]:
        micro_batches: list[PrefetchedBatch] = []
        while len(micro_batches) < self._per_step:
            if self._closing:
                raise _Closing
            micro_batches.append(self._prepare(next(batches), step))
        return micro_batches

    def _prepare(self, batch: Batch, step: int) -> PrefetchedBatch:
        on_host = self._draw(batch, step)
        labelled = int((batch.labels_BL != IGNORE_INDEX).sum())
        return PrefetchedBatch(
            on_host,
            PinnedTree(on_host, self._device),
            batch.sample_ids_B,
            labelled,
            batch.labels_BL.numel(),
            batch.position,
        )
