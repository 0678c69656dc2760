"""Pulse: a rank whose process is stopped, or whose machine is gone, is noticed in seconds, however long a hop may take.

Each rank beats into the job's store from a thread of its own. Computing does not hold the beat up; being stopped does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import Store

EVERY = 1.0
"""Seconds between beats."""
SILENCE = 8.0
"""Seconds without a beat after which a rank counts as stopped."""
GONE = b"gone"


@contextmanager
def watch(store: Store, rank: int, size: int, lost: Callable[[str], None]) -> Iterator[None]:
    """Within it, this rank beats, and `lost` is called with a sentence, in a thread, if another rank falls silent.

    A rank that leaves says so, whatever the reason; one that has not come yet is not missed. store: a client of its own.
    """
    leaving = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, rank, size, lost, leaving), name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join(timeout=2 * EVERY)


def _beat(store: Store, rank: int, size: int, lost: Callable[[str], None], leaving: threading.Event) -> None:
    heard: dict[int, tuple[bytes, float]] = {}
    try:
        store.set_timeout(timedelta(seconds=SILENCE))
        count, before = 0, time.monotonic()
        while not leaving.wait(EVERY):
            store.set(f"pulse/{rank}", str(count := count + 1))
            beats = {p: store.get(f"pulse/{p}") for p in range(size) if p != rank and store.check([f"pulse/{p}"])}
            now = time.monotonic()
            if now - before > SILENCE / 2:  # it was this rank that stood still
                heard.clear()
            before = now
            heard |= {p: (beat, now) for p, beat in beats.items() if beat == GONE or heard.get(p, (b"", 0.0))[0] != beat}
            silent = [p for p, (_, when) in heard.items() if now - when > SILENCE]
            if silent:
                lost(_sentence(rank, silent[0]))
                return
        store.set(f"pulse/{rank}", GONE.decode())
    except RuntimeError:
        return  # the job's store is gone, and the job with it: the launcher ends the ranks


def _sentence(rank: int, peer: int) -> str:
    return (
        f"Rank {rank} heard nothing of rank {peer} for {SILENCE:g} s: its process is stopped, or its machine is gone. "
        "The ring is broken; start the ranks again."
    )
