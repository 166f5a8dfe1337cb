"""The micro-batches of the next step are loaded, and their noise is drawn, while a step runs."""

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

# Seconds that closing waits for a loader which does not return; the process then ends without it.
_PATIENCE = 10.0


class _Closing(Exception):
    """Nothing more is to be drawn."""


class DrawnBatch(NamedTuple):
    """A micro-batch with its noise drawn, on the host."""

    batch: MicroBatch
    packed: PinnedTree  # the same, ready to be copied to the device
    sample_ids_B: Tensor
    labelled: int  # tokens with a label
    tokens: int  # in all
    position: dict[str, int]  # of the loader behind it


class BatchPrefetcher:
    """A thread that reads the loader, draws and packs: at most one step ahead of the one that is taken.

    A context manager; leaving it ends the thread. What goes wrong in the thread is raised where its step is taken.

    Args:
        loader: of batches; read by the thread alone, from the first `take` on.
        draw: (batch, step) -> its micro-batch.
        per_step: micro-batches of a step.
        last_step: nothing is drawn for steps behind it.
        device: where the micro-batches go.
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
        self._steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # to draw; None ends the thread
        self._drawn: queue.SimpleQueue[list[DrawnBatch] | BaseException] = queue.SimpleQueue()
        self._asked = 0  # the last step in `_steps`
        self._awaited = threading.Event()  # `take` waits, or nothing will be taken any more
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="draw ahead")

    def __enter__(self) -> "BatchPrefetcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._steps.put(None)
        self._awaited.set()
        self._thread.join(_PATIENCE)

    @property
    def thread(self) -> int:
        """The thread's identifier."""
        return self._thread.ident or 0

    def take(self, step: int) -> list[DrawnBatch]:
        """Wait for the micro-batches of a step, and let those of the next be drawn."""
        self._awaited.set()
        if self._asked < step:
            self._steps.put(step)
        drawn = self._drawn.get()
        self._awaited.clear()
        if isinstance(drawn, BaseException):
            raise drawn
        self._asked = step
        if step < self._last_step:
            self._asked = step + 1
            self._steps.put(self._asked)
        return drawn

    def wait_until_needed(self) -> None:
        """Wait, in the thread, until the main thread waits for it.

        Worker processes are forked then, when the main thread holds no lock that they would inherit.
        """
        self._awaited.wait()
        if self._closing:
            raise _Closing

    def _run(self) -> None:
        batches = None
        while (step := self._steps.get()) is not None:
            try:
                if batches is None:
                    devices.use(self._device)
                    batches = iter(self._loader)
                self._drawn.put(self._load(batches, step))
            except BaseException as error:  # whatever it is, `take` raises it
                self._drawn.put(error)
                return

    def _load(self, batches: Iterator[Batch], step: int) -> list[DrawnBatch]:
        drawn: list[DrawnBatch] = []
        while len(drawn) < self._per_step:
            if self._closing:
                raise _Closing
            drawn.append(self._pack(next(batches), step))
        return drawn

    def _pack(self, batch: Batch, step: int) -> DrawnBatch:
        drawn = self._draw(batch, step)
        labelled = int((batch.labels_BL != IGNORE_INDEX).sum())
        return DrawnBatch(
            drawn,
            PinnedTree(drawn, self._device),
            batch.sample_ids_B,
            labelled,
            batch.labels_BL.numel(),
            batch.position,
        )
