"""Prefetch thread: order, one step ahead at most, errors raised at their step, clean shutdown."""

import queue
import threading
from types import SimpleNamespace

import pytest
import torch

from memdlm_dist.config import parse_config
from memdlm_dist.data.loader import Batch, EpochLoader
from memdlm_dist.errors import UserError
from memdlm_dist.training import prefetch
from memdlm_dist.training.prefetch import BatchPrefetcher
from memdlm_dist.training.trainer import MemDLMTrainer


class Loader:
    """Loader of `n_batches` numbered batches that then calls `at_end` before another batch."""

    def __init__(self, n_batches=100, at_end=None):
        self.read, self.n_batches, self.at_end = 0, n_batches, at_end

    def __iter__(self):
        while True:
            if self.read == self.n_batches:
                self.at_end()
            self.read += 1
            tokens = torch.full((2, 3), self.read)
            labels = torch.tensor([[-100, 1, 1], [1, -100, 1]])
            yield Batch(tokens, labels, tokens[:, 0], None, {"samples": self.read})


def prefetcher(loader, per_step=2, last_step=3):
    return BatchPrefetcher(
        loader, lambda batch, step: (step, batch.tokens_BL), per_step, last_step, torch.device("cpu")
    )


def test_a_step_is_drawn_ahead_and_no_more():
    loader = Loader()
    with prefetcher(loader) as ahead:
        for step in (1, 2, 3):
            drawn = ahead.take(step)
            assert [micro.on_host[0] for micro in drawn] == [step, step], "drawn with their own step's noise"
            assert [micro.loader_position["samples"] for micro in drawn] == [2 * step - 1, 2 * step]
            assert [(micro.labelled, micro.tokens) for micro in drawn] == [(4, 6)] * 2
            assert drawn[0].pinned.to_device() is drawn[0].on_host
            assert loader.read <= 2 * step + 2
    assert loader.read == 6, "nothing is drawn after the last step"
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_a_checkpoint_has_the_position_of_what_was_trained_on():
    """Position of the last trained batch, not of the prefetched one."""
    rows = [{"tokens": torch.ones(2, 3), "labels": torch.ones(2, 3), "sample_id": torch.arange(2)}] * 50
    loader, drawn = EpochLoader.__new__(EpochLoader), queue.SimpleQueue()
    vars(loader).update(
        _loader=rows, _read=lambda: iter(rows), _dataset=SimpleNamespace(epoch_size=100, group_size=1),
        _global_micro_batch_size=2, global_batch_size=4, position={"epoch": 0, "samples": 0, "nodes": 1},
    )  # fmt: skip
    trainer = MemDLMTrainer.__new__(MemDLMTrainer)
    vars(trainer).update(
        dataloader=loader, ntokens_seen=0, watchdog=SimpleNamespace(at=lambda *_, **__: None),
        metrics_processor=SimpleNamespace(data_loading_times=[], ntokens_since_last_log=0),
    )  # fmt: skip

    def draw(_, step):
        assert step > 1 or loader.state_dict()["samples"] == 0, "the loader's position moves only when a batch is taken"
        drawn.put(step)

    with BatchPrefetcher(loader, draw, 2, 30, torch.device("cpu")) as ahead:
        for trainer.step in range(1, 28):  # past the end of the epoch of 25 steps
            trainer._next_micro_batches(ahead)
            while drawn.get() <= trainer.step:
                pass
            drawn.get()  # the next step's second micro-batch: the whole step is drawn
            epoch, step = divmod(trainer.step - 1, 25)
            assert loader.state_dict() == {"epoch": epoch, "samples": 4 * (step + 1), "nodes": 1}


def test_errors_are_raised_where_their_step_is_taken():
    def corrupt():
        raise UserError("The shard is corrupt.")

    with prefetcher(Loader(3, corrupt)) as ahead:
        assert len(ahead.take(1)) == 2
        with pytest.raises(UserError, match=r"The shard is corrupt\."):
            ahead.take(2)


def test_worker_processes_are_started_while_the_main_thread_waits():
    states = []

    def start_workers():
        ahead.wait_until_needed()
        states.append(taking.is_set())

    loader, taking = Loader(2, start_workers), threading.Event()
    with prefetcher(loader) as ahead:
        ahead.take(1)
        assert loader.read == 2 and states == []
        taking.set()
        ahead.take(2)
        assert states == [True]


def test_what_is_left_of_a_step_is_not_drawn_when_training_ends():
    def load_until_shutdown():
        begun.set()
        ahead._needed.wait()

    loader, begun = Loader(3, load_until_shutdown), threading.Event()
    with prefetcher(loader, per_step=3) as ahead:
        ahead.take(1)
        begun.wait()
    assert loader.read == 4 and not ahead._thread.is_alive()


def test_a_loader_that_waits_to_start_workers_or_for_ever_can_be_left(monkeypatch):
    with prefetcher(Loader(2, lambda: ahead.wait_until_needed())) as ahead:
        ahead.take(1)
    assert not ahead._thread.is_alive()
    monkeypatch.setattr(prefetch, "_CLOSE_TIMEOUT", 0.0)
    for_ever = threading.Event()
    with pytest.raises(KeyError), prefetcher(Loader(2, for_ever.wait)) as ahead:
        ahead.take(1)
        raise KeyError("an error of the step")
    for_ever.set()


def test_flags_are_awaited_where_a_rank_that_hangs_is_named():
    """Reading the consensus flags is where the host first notices a device that waits for another rank."""
    waiting, settled = [], []  # needs_others at each report; (step, needs_others) at each read of the flags
    trainer = MemDLMTrainer.__new__(MemDLMTrainer)
    vars(trainer).update(
        job_config=parse_config.parse(["--job.config_file", "train_configs/debug.toml", "--training.steps", "2"]),
        step=0, ntokens_seen=0, gradient_accumulation_steps=1,
        dataloader=SimpleNamespace(token_shares=lambda: None, stream_shares=lambda: [], global_batch_size=1),
        device=torch.device("cpu"), gc_handler=SimpleNamespace(run=lambda step: None), model_parts=[],
        validator=SimpleNamespace(validate=lambda *_: {}, should_validate=lambda step: False),
        checkpointer=SimpleNamespace(
            load=lambda step: False, save=lambda *_, **__: None, is_due=lambda step, last: step == 1,
            note_validation=lambda *_: None,
        ),
        watchdog=SimpleNamespace(at=lambda doing, needs_others=True: waiting.append(needs_others)),
        consensus=SimpleNamespace(stop=False, finish=lambda: settled.append((trainer.step, waiting[-1]))),
        train_step=lambda batches: trainer.watchdog.at("taking a step"), _shorten_timeouts=lambda: None,
    )  # fmt: skip
    trainer.train()
    assert settled == [(1, True), (2, True)]
