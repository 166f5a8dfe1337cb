"""Whom the watchdog names, from where the ranks say that they are."""

import hashlib
import json
import time

from memdlm_dist.runtime.watchdog import RankStatus, Watchdog, explanation, missing


def place(rank: int, progress: int = 5, line: str = "all_reduce", in_collective: bool = True, still=90.0, **more):
    return RankStatus(
        rank, f"host{rank}", 1000 + rank, progress, "taking step 5", line, in_collective, still, 7, **more
    )


SILENCE = 16.0


def names(*places: RankStatus) -> list[int]:
    return [found.rank for found in missing(places, SILENCE)]


def test_who_is_missing():
    here = place(0)
    assert names(here, place(1), place(2)) == [], "all are in the same collective"
    assert names(here, place(1, silent=20.0), place(2, progress=4)) == [1], "the silent one first"
    assert names(here, place(1), place(2, progress=4, line="read", in_collective=False, still=1.0)) == [2], "one behind"
    computing = {"line": "matmul", "in_collective": False}
    assert names(here, place(1), place(2, **computing, still=0.1)) == [], "one that is at work is no hang"
    assert names(here, place(1), place(2, **computing, still=88.0)) == [2], "at rest outside of any collective"
    assert names(place(0, line="item", in_collective=False), place(1, line="item", in_collective=False)) == []
    # On an accelerator a main thread rests anywhere behind the collectives that it has enqueued.
    rests = {"line": "synchronize", "in_collective": False, "still": 88.0}
    assert names(place(0, begun=7), place(1, **rests, begun=7), place(2, **rests, begun=6)) == [2]
    assert names(place(0, begun=7), place(1, line="compile", in_collective=False, still=1.0, begun=6)) == []


def test_what_is_said():
    text = explanation([place(0), place(1), place(2, progress=4, line="reader.py:7 in read")], [], SILENCE)
    assert text.startswith(
        "No progress for 90 s while taking step 5: rank 2 (node host2, process 1002) is taking step 5 "
    )
    assert "(reader.py:7 in read), while ranks 0, 1 waited in taking step 5 (all_reduce); see that rank's log" in text
    assert "silent for 20 s) was last seen" in explanation([place(0), place(1, silent=20.0)], [], SILENCE)
    assert "all ranks wait in taking step 5 (all_reduce)" in explanation([place(0), place(1)], [], SILENCE)
    assert "ranks 3, 4 never came" in explanation([place(0)], [3, 4], SILENCE)


class Store(dict):
    """As torch's, but in this process."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


def test_a_single_rank_and_a_rank_at_work_are_left_alone():
    """No other rank, or all at work for longer than the timeout: nothing happens."""
    said, store = [], Store()
    alone = Watchdog(0, 1, store, 0.3, said.append)
    alone.start()
    alone.at("computing")
    began = time.monotonic()
    while time.monotonic() < began + 1.0:  # long in one line
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
    alone.stop()
    assert said == [] and json.loads(store["memdlm/place/0"])["still"] < 0.5
    asleep = Watchdog(0, 1, store, 0.3, said.append)
    asleep.start()
    time.sleep(1.0)
    asleep.stop()
    assert json.loads(store["memdlm/place/0"])["still"] > 0.5


def test_a_rank_that_never_came_is_named():
    said: list[str] = []
    waiting = Watchdog(0, 2, Store(), 0.4, said.append)
    waiting.start()
    waiting.at("waiting for it")
    waiting._thread.join(5)
    assert len(said) == 1 and "while waiting for it: rank 1 never came" in said[0]
