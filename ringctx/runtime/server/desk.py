"""Desk: where HTTP hands jobs to the ring, one queue in order of arrival, and where what comes of them goes back.

Two threads meet here: the event loop puts jobs and may leave them; the ring's thread gets them one by one.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from ringctx.runtime.answer import Answer
from ringctx.runtime.server.bodies import Ask
from ringctx.runtime.server.refusal import Refusal


@dataclass(frozen=True)
class Read:
    """A document to read and to keep under this id."""

    document: str
    text: str


@dataclass(frozen=True)
class Forget:
    """A document to drop."""

    document: str


@dataclass(frozen=True)
class Done:
    """How a job ended. num_cached: tokens of the prompt that had been read before. num_tokens: of the document read."""

    answer: Answer | None = None
    finish: str = "stop"
    num_cached: int = 0
    num_tokens: int = 0


class Text(str):
    """A piece of the answer."""


Event = Text | Done | Refusal


@dataclass(eq=False)
class Job:
    """Work for the ring, and the way back to whoever waits for it: pieces of text, then how it ended. Made on the event loop."""

    work: Ask | Read | Forget
    is_gone: bool = False
    arrived: float = field(default_factory=time.monotonic)
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def tell(self, event: Event) -> None:
        """From the ring's thread to the event loop."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server stopped waiting
            self.is_gone = True


class Desk:
    """At most `places` jobs wait, besides the one that the ring is working on."""

    def __init__(self, places: int) -> None:
        self.places, self.is_stopping, self.is_working = places, False, False
        self.mean_seconds = 1.0
        self._waiting: deque[Job] = deque()
        self._lock, self._bell = threading.Lock(), SimpleQueue[None]()

    @property
    def num_waiting(self) -> int:
        """Jobs that the ring has not begun."""
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Queue a job. Raises Refusal (429) when all places are taken, 503 when the server is stopping; Forget always finds a place."""
        with self._lock:
            if self.is_stopping:
                raise stopping()
            if len(self._waiting) >= self.places and not isinstance(job.work, Forget):
                wait = max(1, math.ceil(self.mean_seconds * len(self._waiting)))
                raise Refusal(429, "queue_full", f"{self.places} requests wait already; ask again in {wait} s.", retry=wait)
            self._waiting.append(job)
        self._bell.put(None)

    def leave(self, job: Job) -> None:
        """Nobody waits for this job any more: its place is free at once, and the ring breaks off if it has begun."""
        job.is_gone = True
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)

    def get(self, timeout: float) -> Job | None:
        """The next job; None when there is none for so many seconds, or when the server is stopping."""
        ends = time.monotonic() + timeout
        while not self.is_stopping:
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()
            try:
                self._bell.get(timeout=max(ends - time.monotonic(), 0))
            except Empty:
                return None
        return None

    def took(self, seconds: float) -> None:
        """A job was done in so many seconds."""
        self.mean_seconds += 0.2 * (seconds - self.mean_seconds)

    def stop(self, *_: Any) -> None:
        """Take no more jobs and break off the one that runs. May be called as a signal's handler: it takes no lock."""
        self.is_stopping = True
        self._bell.put(None)

    def close(self) -> None:
        """Tell whoever still waits that the server is stopping."""
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            job.tell(stopping())


def stopping() -> Refusal:
    """The server is on its way out."""
    return Refusal(503, "stopping", "The server is stopping; ask again when it is back.")
