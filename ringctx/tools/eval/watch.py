"""Watch: the anonymous memory of this process, which no counter of Linux keeps the peak of."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL = 0.01
"""Seconds between two looks: a tenth of a millisecond each, and a peak shorter than this may be missed."""


@dataclass
class Peak:
    """bytes: the most that was seen; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def anonymous() -> Iterator[Peak]:
    """Watch in a thread of its own while the block runs; the result is final when it ends."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        seen = now()
        peak.bytes = seen if peak.bytes is None or seen is None else max(peak.bytes, seen)

    def watch() -> None:
        while not done.wait(INTERVAL):
            look()

    look()
    thread = threading.Thread(target=watch, name="ringctx-watch", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        look()


def now() -> int | None:
    """Bytes of anonymous memory in RAM: neither files nor memory shared with them."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
