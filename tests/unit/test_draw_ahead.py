"""Batches drawn ahead: in order, no more than one step, with errors where they belong, and an end to it."""

import threading

import pytest
import torch

from memdlm_dist.data.loader import Batch
from memdlm_dist.errors import UserError
from memdlm_dist.training import draw_ahead
from memdlm_dist.training.draw_ahead import DrawAhead


class Loader:
    """Batches that count themselves; from `until` on, what `then` does."""

    def __init__(self, until=100, then=None):
        self.read, self.until, self.then = 0, until, then

    def __iter__(self):
        while True:
            if self.read == self.until:
                self.then()
            self.read += 1
            tokens = torch.full((2, 3), self.read)
            labels = torch.tensor([[-100, 1, 1], [1, -100, 1]])
            yield Batch(tokens, labels, tokens[:, 0], None, {"samples": self.read})


def ahead_of(loader, per_step=2, last_step=3):
    return DrawAhead(loader, lambda batch, step: (step, batch.tokens_BL), per_step, last_step, torch.device("cpu"))


def test_a_step_is_drawn_ahead_and_no_more():
    loader = Loader()
    with ahead_of(loader) as ahead:
        for step in (1, 2, 3):
            drawn = ahead.take(step)
            assert [one.batch[0] for one in drawn] == [step, step], "each with the noise of its own step"
            assert [one.position["samples"] for one in drawn] == [2 * step - 1, 2 * step]
            assert [(one.labelled, one.tokens) for one in drawn] == [(4, 6)] * 2
            assert drawn[0].packed.to_device() is drawn[0].batch
            assert loader.read <= 2 * step + 2
    assert loader.read == 6, "nothing is drawn behind the last step"
    assert "draw ahead" not in [thread.name for thread in threading.enumerate()]


def test_errors_are_raised_where_their_step_is_taken():
    def corrupt():
        raise UserError("The shard is corrupt.")

    with ahead_of(Loader(3, corrupt)) as ahead:
        assert len(ahead.take(1)) == 2
        with pytest.raises(UserError, match=r"The shard is corrupt\."):
            ahead.take(2)


def test_worker_processes_are_started_while_the_main_thread_waits():
    states = []

    def start_workers():
        ahead.until_awaited()
        states.append(taking.is_set())

    loader, taking = Loader(2, start_workers), threading.Event()
    with ahead_of(loader) as ahead:
        ahead.take(1)
        assert loader.read == 2 and states == []
        taking.set()
        ahead.take(2)
        assert states == [True]


def test_a_loader_that_waits_to_start_workers_or_for_ever_can_be_left(monkeypatch):
    with ahead_of(Loader(2, lambda: ahead.until_awaited())) as ahead:
        ahead.take(1)
    assert not ahead._thread.is_alive()
    monkeypatch.setattr(draw_ahead, "_PATIENCE", 0.0)
    for_ever = threading.Event()
    with pytest.raises(KeyError), ahead_of(Loader(2, for_ever.wait)) as ahead:
        ahead.take(1)
        raise KeyError("an error of the step")
    for_ever.set()
