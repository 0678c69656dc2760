"""Timeline: of one rank, when messages were posted, how long they were waited for, and the calls that they belong to.

Knows moments. Knows nothing of what was sent or computed, nor how long a message travelled: only that it had arrived when the wait for
it ended. What a call did neither posting nor waiting is computing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Moment = Any
"""Seconds of the host's clock, or an event in a CUDA stream."""


class Span(NamedTuple):
    """Seconds from the timeline's start."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Trip:
    """Messages that were posted together. moments: posting began and ended, waiting began and ended; without the last two it is under way.

    received, sent: bytes. now: the timeline's clock.
    """

    kind: str
    what: str
    received: int
    sent: int
    now: Callable[[], Moment]
    moments: list[Moment] = field(default_factory=list)

    def mark(self) -> None:
        """The next moment has come."""
        self.moments.append(self.now())


class Journey(NamedTuple):
    """A trip in seconds. flight: from the end of posting to the end of waiting, of which `waiting` was not hidden by anything."""

    kind: str
    what: str
    received: int
    sent: int
    posting: Span
    waiting: Span

    @property
    def flight(self) -> Span:
        return Span(self.posting.ended, self.waiting.ended)


class Timeline:
    """What one rank recorded, from `Ring.recorded`. On CUDA moments are those of the current stream, in which kernels wait for messages
    (not run on a GPU yet).

    origin: seconds since 1970 when it began, by which the timelines of ranks are laid over each other.
    """

    def __init__(self, *, is_cuda: bool = False) -> None:
        self.is_cuda, self.origin = is_cuda, time.time()
        self._trips: list[Trip] = []
        self._calls: list[tuple[str, Moment, Moment]] = []
        self._start = self.moment()

    def moment(self) -> Moment:
        """Now."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def trip(self, kind: str, what: str, received: int, sent: int) -> Trip:
        """Record messages that are about to be posted."""
        trip = Trip(kind, what, received, sent, self.moment)
        trip.mark()
        self._trips.append(trip)
        return trip

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """What runs inside is one call."""
        began = self.moment()
        yield
        self._calls.append((what, began, self.moment()))

    # -- what it tells ----------------------------------------------------------------------------------------------

    def journeys(self) -> list[Journey]:
        """All trips that have ended, as they were posted."""
        self._finish()
        ended = [trip for trip in self._trips if len(trip.moments) == 4]
        return [
            Journey(t.kind, t.what, t.received, t.sent, Span(*map(self._seconds, t.moments[:2])), Span(*map(self._seconds, t.moments[2:])))
            for t in ended
        ]

    def calls(self) -> list[tuple[str, Span]]:
        """All calls that have ended."""
        self._finish()
        return [(what, Span(self._seconds(began), self._seconds(ended))) for what, began, ended in self._calls]

    def computing(self) -> list[Span]:
        """The parts of calls in which nothing was posted or waited for."""
        busy = sorted(span for one in self.journeys() for span in (one.posting, one.waiting))
        found = []
        for _, call in self.calls():
            at = call.began
            for span in busy:
                if call.began <= span.began <= call.ended:
                    found.append(Span(at, span.began))
                    at = max(at, span.ended)
            found.append(Span(at, call.ended))
        return [span for span in found if span.seconds > 0]

    def _finish(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def _seconds(self, moment: Moment) -> float:
        return self._start.elapsed_time(moment) / 1000 if self.is_cuda else moment - self._start
