"""Hang detector: which rank it names, from the status that each rank reports."""

import hashlib
import json
import time

from memdlm_dist.runtime.watchdog import RankStatus, Watchdog, explanation, missing


def status(rank: int, progress: int = 5, line: str = "all_reduce", in_collective: bool = True, still=90.0, **more):
    return RankStatus(
        rank, f"host{rank}", 1000 + rank, progress, "taking step 5", line, in_collective, still, 7, **more
    )


SILENCE = 16.0


def named(*statuses: RankStatus) -> list[int]:
    return [one.rank for one in missing(statuses, SILENCE)]


def test_who_is_missing():
    waiting = status(0)
    assert named(waiting, status(1), status(2)) == [], "all ranks wait in the same collective"
    assert named(waiting, status(1, silent=20.0), status(2, progress=4)) == [1], "silence comes first"
    assert named(waiting, status(1), status(2, progress=4, line="read", in_collective=False, still=1.0)) == [2], "lags"
    computing = {"line": "matmul", "in_collective": False}
    assert named(waiting, status(1), status(2, **computing, still=0.1)) == [], "busy is no hang"
    assert named(waiting, status(1), status(2, **computing, still=88.0)) == [2], "idle"
    assert named(status(0, line="item", in_collective=False), status(1, line="item", in_collective=False)) == []
    # On an accelerator the main thread may be idle anywhere after the collectives it has enqueued.
    idle = {"line": "synchronize", "in_collective": False, "still": 88.0}
    assert named(status(0, begun=7), status(1, **idle, begun=7), status(2, **idle, begun=6)) == [2]
    assert named(status(0, begun=7), status(1, line="compile", in_collective=False, still=1.0, begun=6)) == []


def test_what_is_said():
    text = explanation([status(0), status(1), status(2, progress=4, line="reader.py:7 in read")], [], SILENCE)
    assert text.startswith(
        "No progress for 90 s while taking step 5: rank 2 (node host2, process 1002) is taking step 5 "
    )
    assert "(reader.py:7 in read), while ranks 0, 1 waited in taking step 5 (all_reduce); see that rank's log" in text
    assert "silent for 20 s) was last seen" in explanation([status(0), status(1, silent=20.0)], [], SILENCE)
    assert "all ranks wait in taking step 5 (all_reduce)" in explanation([status(0), status(1)], [], SILENCE)
    assert "ranks 3, 4 never reported a status" in explanation([status(0)], [3, 4], SILENCE)


class Store(dict):
    """In-process stand-in for torch's store."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


def test_a_single_rank_and_a_rank_at_work_are_left_alone():
    """No report from a single rank, whether it computes or sleeps for longer than the timeout."""
    reports, store = [], Store()
    busy = Watchdog(0, 1, store, 0.3, reports.append)
    busy.start()
    busy.at("computing")
    began = time.monotonic()
    while time.monotonic() < began + 1.0:  # stays in one line for long
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
    busy.stop()
    assert reports == [] and json.loads(store["memdlm/place/0"])["still"] < 0.5
    asleep = Watchdog(0, 1, store, 0.3, reports.append)
    asleep.start()
    time.sleep(1.0)
    asleep.stop()
    assert json.loads(store["memdlm/place/0"])["still"] > 0.5


def test_a_rank_that_never_came_is_named():
    reports: list[str] = []
    waiting = Watchdog(0, 2, Store(), 0.4, reports.append)
    waiting.start()
    waiting.at("waiting for it")
    waiting._thread.join(5)
    assert len(reports) == 1 and "while waiting for it: rank 1 never reported a status" in reports[0]
