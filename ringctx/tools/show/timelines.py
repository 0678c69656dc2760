"""Timelines: a rank's timeline as a trace, and the traces of all ranks, laid over each other by the clock.

Knows Chrome's trace format, which ui.perfetto.dev opens: a process a rank; threads for calls, computing, posting and waiting, and one for
each kind of message under way.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ringctx.core.timeline import Span, Timeline
from ringctx.errors import ConfigError


def chrome(timeline: Timeline, rank: int) -> dict[str, Any]:
    """The trace of one rank."""
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


def save(timeline: Timeline, folder: Path, rank: int) -> None:
    """Write a rank's trace into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank}.trace.json").write_text(json.dumps(chrome(timeline, rank)) + "\n")


def _event(origin: float, rank: int, row: int, name: str, span: Span, **args: Any) -> dict[str, Any]:
    """A span in microseconds."""
    where = {"ph": "X", "pid": rank, "tid": row, "ts": (origin + span.began) * 1e6, "dur": span.seconds * 1e6}
    return {"name": name, "args": args, **where}


@dataclass(frozen=True)
class Rank:
    """Of one rank: rows by name, each of (what, began, ended, what moved) in seconds from the earliest of all ranks."""

    rank: int
    rows: dict[str, list[tuple[str, float, float, dict[str, Any]]]]

    def seconds(self, row: str) -> float:
        """Of everything in a row."""
        return sum(ended - began for _, began, ended, _ in self.rows.get(row, ()))

    def moved(self) -> list[tuple[str, int, int, int, float]]:
        """By what was sent: how often, bytes received and sent, and seconds of posting and waiting for it."""
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
        for row, spans in self.rows.items():
            for what, began, ended, args in spans:
                if row.endswith("under way"):
                    found[what][0] += 1
                    found[what][1] += args["received"]
                    found[what][2] += args["sent"]
                elif args:
                    found[what.removeprefix("posting ").removeprefix("waiting for ")][3] += ended - began
        return [(what, int(n), int(received), int(sent), seconds) for what, (n, received, sent, seconds) in found.items()]


def merged(folder: Path) -> dict[str, Any]:
    """One trace of all ranks' in a folder. Raises ConfigError where there are none."""
    paths = sorted(folder.glob("rank-*.trace.json"))
    if not paths:
        raise ConfigError(f"There is no rank-0.trace.json in {str(folder)!r}; write some with `ringctx bench --trace {folder}`.")
    events = [event for path in paths for event in json.loads(path.read_text())["traceEvents"]]
    first = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
    moved = [event | {"ts": event["ts"] - first} if event["ph"] == "X" else event for event in events]
    return {"traceEvents": moved, "displayTimeUnit": "ms"}


def ranks(trace: dict[str, Any]) -> list[Rank]:
    """What a merged trace tells, by rank."""
    names, rows = {}, defaultdict[int, dict[str, list[Any]]](lambda: defaultdict(list))
    for event in trace["traceEvents"]:
        if event["name"] == "thread_name":
            names[event["pid"], event["tid"]] = event["args"]["name"]
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            began = event["ts"] / 1e6
            span = (event["name"], began, began + event["dur"] / 1e6, event["args"])
            rows[event["pid"]][names[event["pid"], event["tid"]]].append(span)
    return [Rank(rank, dict(of)) for rank, of in sorted(rows.items())]
