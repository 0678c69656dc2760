"""Timeline: of one rank, when messages were posted, how long they were waited for, and the calls that they belong to.

Knows moments. Knows nothing of what was sent or computed, nor how long a message travelled: only that it had arrived when the wait for
it ended. What a call did neither posting nor waiting is computing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
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

    received, sent: bytes.
    """

    kind: str
    what: str
    received: int
    sent: int
    moments: list[Moment] = field(default_factory=list)


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
    """What one rank recorded, from `Ring.recorded`. On CUDA moments are those of the current stream, in which kernels wait for messages.

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
        self._trips.append(Trip(kind, what, received, sent, [self.moment()]))
        return self._trips[-1]

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


def chrome(timeline: Timeline, rank: int) -> dict[str, Any]:
    """Chrome's trace format, a process a rank, which ui.perfetto.dev opens; `ringctx show` merges those of all ranks.

    Threads: calls, computing, posting and waiting, and one for each kind of message under way.
    """
    journeys = timeline.journeys()
    kinds = list(dict.fromkeys(one.kind for one in journeys))
    rows = ["calls", "computing", "posting and waiting", *(f"{kind} under way" for kind in kinds)]
    event = partial(_event, timeline.origin, rank)
    events = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}]
    events += [{"ph": "M", "name": "thread_name", "pid": rank, "tid": n, "args": {"name": row}} for n, row in enumerate(rows)]
    events += [event(0, what, span) for what, span in timeline.calls()]
    events += [event(1, "computing", span) for span in timeline.computing()]
    for one in journeys:
        moved = {"kind": one.kind, "received": one.received, "sent": one.sent}
        events.append(event(2, f"posting {one.what}", one.posting, **moved))
        events.append(event(2, f"waiting for {one.what}", one.waiting, **moved))
        events.append(event(3 + kinds.index(one.kind), one.what, one.flight, **moved))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def save(timeline: Timeline, folder: Path, rank: int) -> Path:
    """Write a rank's trace into the folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank}.trace.json"
    path.write_text(json.dumps(chrome(timeline, rank)) + "\n")
    return path


def _event(origin: float, rank: int, row: int, name: str, span: Span, **args: Any) -> dict[str, Any]:
    """A span in microseconds."""
    where = {"ph": "X", "pid": rank, "tid": row, "ts": (origin + span.began) * 1e6, "dur": span.seconds * 1e6}
    return {"name": name, "args": args, **where}
