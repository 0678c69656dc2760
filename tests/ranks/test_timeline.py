"""Timelines: what was sent is in them with its bytes, times add up, and a rank that comes late is what others waited for."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from ringctx import Attention, Layout, ring_attention
from ringctx.core.ring import Ring
from ringctx.core.timeline import Journey, Span, Timeline
from ringctx.tools.show.timelines import chrome
from tests.pool import Pool

S, LATE = 600, 0.4


def recorded(ring: Ring, transport: str, late: int = -1) -> tuple[list[Journey], list[tuple[str, Span]], list[Span], dict[str, Any], Any]:
    """Forward and backward; rank `late` comes later than the others."""
    layout = Layout.zigzag(S, ring.size)
    make = torch.Generator().manual_seed(0)
    q, k, v = (layout.shard(torch.randn(1, S, 4, 32, generator=make), ring.rank).requires_grad_() for _ in range(3))
    attend = lambda: ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(), transport=transport)
    attend().sum().backward()  # plans
    ring.traffic.reset()
    with ring.recorded() as timeline:
        if ring.rank == late:
            time.sleep(LATE)
        attend().sum().backward()
    sent = dict(ring.traffic.sent)
    attend()  # is not recorded
    return timeline.journeys(), timeline.calls(), timeline.computing(), chrome(timeline, ring.rank), sent


@pytest.mark.parametrize("transport", ["rotate", "fetch", "heads", "pass_q"])
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_counted_and_times_add_up(pool: Pool, size: int, transport: str) -> None:
    for journeys, calls, computing, trace, sent in pool.run(recorded, transport, size=size):
        assert {kind: sum(j.sent for j in journeys if j.kind == kind) for kind in sent} == sent
        assert [what for what, _ in calls] == ["forward", "backward"]
        spans = [span for j in journeys for span in (j.posting, j.waiting)]
        assert all(0 <= span.began <= span.ended for span in spans) and all(j.posting.ended <= j.waiting.began for j in journeys)
        inside = [s for s in spans if any(call.began <= s.began and s.ended <= call.ended for _, call in calls)]
        total = sum(span.seconds for span in (*inside, *computing))
        assert total == pytest.approx(sum(call.seconds for _, call in calls), rel=1e-6)
        assert sum(span.seconds for span in computing) > 0
        drawn = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        assert len(drawn) == len(calls) + len(computing) + 3 * len(journeys)


def test_a_hop_of_a_ring_is_a_trip_each_way(pool: Pool) -> None:
    for journeys, *_ in pool.run(recorded, "rotate", size=3):
        told = [j.what for j in journeys if j.kind in ("keys", "grads")]
        assert told.count("keys at hop 1") == told.count("keys at hop 2") == 2
        assert told.count("gradients at hop 1") == told.count("gradients at hop 2") == 1


def test_who_comes_late_is_waited_for(pool: Pool) -> None:
    first, second = pool.run(recorded, "rotate", 1, size=2)
    longest = [max(one[0], key=lambda j: j.waiting.seconds) for one in (first, second)]
    assert longest[0].kind == "header" and longest[0].waiting.seconds > 0.8 * LATE
    assert longest[1].waiting.seconds < 0.5 * LATE


def test_nothing_is_written_down_when_nobody_asked(pool: Pool) -> None:
    assert Ring.alone().traffic.timeline is None
    with Ring.alone().recorded() as timeline:
        pass
    assert timeline.journeys() == [] and timeline.calls() == [] and timeline.computing() == []


class FakeEvent:
    """An event of a stream whose clock goes on by two milliseconds at each record."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 2.0
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_on_cuda_moments_are_events_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    synchronized: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    timeline = Timeline(is_cuda=True)
    with timeline.call("forward"):
        trip = timeline.trip("keys", "keys at hop 1", 8, 8)
        for _ in range(3):
            trip.mark()
    assert timeline.calls() == [("forward", Span(0.002, pytest.approx(0.012)))]
    (journey,) = timeline.journeys()
    assert journey.posting == pytest.approx((0.004, 0.006)) and journey.waiting == pytest.approx((0.008, 0.010))
    assert sum(span.seconds for span in timeline.computing()) == pytest.approx(0.006) and synchronized
