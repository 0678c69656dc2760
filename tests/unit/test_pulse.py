"""A silent rank is noticed; one that leaves, has not come, or merely computes is not."""

import threading
import time

import pytest
from torch.distributed import HashStore

from ringctx.runtime import pulse


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(pulse, "EVERY", 0.02)
    monkeypatch.setattr(pulse, "SILENCE", 0.4)


def listen(store, seconds, size=2):
    said = []
    with pulse.watch(store, 0, size, said.append):
        time.sleep(seconds)
    return said


def test_a_rank_that_beat_once_and_stopped_is_named():
    store = HashStore()
    store.set("pulse/1", "1")
    (sentence,) = listen(store, 1.0)
    assert sentence.startswith("Rank 0 heard nothing of rank 1 for 0.4 s")


def test_ranks_that_leave_or_have_not_come_are_not_missed():
    store = HashStore()
    with pulse.watch(store, 1, 3, lambda _: None):
        time.sleep(0.1)
    assert store.get("pulse/1") == pulse.GONE
    assert listen(store, 1.0, size=3) == []


def test_a_rank_that_beats_is_alive_however_busy():
    store = HashStore()
    with pulse.watch(store, 1, 2, lambda _: None):
        assert listen(store, 1.0) == []


def test_a_rank_that_stood_still_itself_blames_nobody(monkeypatch):
    store, said = HashStore(), []
    leaving = threading.Event()
    clock = iter([0.0, 0.02, 5.0, 5.02])

    def tick():
        now = next(clock, None)
        if now is None:
            leaving.set()
            return 5.04
        return now

    store.set("pulse/1", "1")
    monkeypatch.setattr(pulse.time, "monotonic", tick)
    pulse._beat(store, 0, 2, said.append, leaving)
    assert said == []
