"""Simulate: the loop that moves keys, in seconds: when each rank posts, computes and waits, from plans of all ranks and costs.

Knows plans. Knows nothing of machines: what a visit and a message cost it is told. Follows `ringctx.core.loop` and `transport` step by
step: a rank waits for a hop, posts the next, and computes while that travels; in backward gradients travel a hop behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ringctx.core.loop import early, least_tokens
from ringctx.core.plan import Hop, Parcel, Plan, Visit, steps_of
from ringctx.core.tiles import width


@dataclass(frozen=True)
class Link:
    """One direction of what connects two ranks: seconds before the first byte, and bytes a second."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        """Of a message."""
        return self.latency + size / self.bandwidth if size else 0.0


@dataclass(frozen=True)
class Costs:
    """work: seconds of a visit on a rank. keys, grads: bytes a token. link: between two ranks. post: seconds that posting takes.

    hidden: the share of a message's time that the device can compute in; 1 where messages move by themselves, 0 where they take the core.
    """

    work: Callable[[int, Visit], float]
    keys: float
    grads: float
    link: Callable[[int, int], Link]
    post: float = 0.0
    hidden: float = 1.0


@dataclass(frozen=True)
class Times:
    """Seconds: until the last rank has ended; and of each rank, computing and waiting or posting."""

    total: float
    computing: tuple[float, ...]
    exposed: tuple[float, ...]


class _Clocks:
    """Where each rank is, and what it did so far."""

    def __init__(self, size: int, costs: Costs) -> None:
        self.costs, self.now = costs, [0.0] * size
        self.computing, self.exposed = [0.0] * size, [0.0] * size

    def compute(self, rank: int, seconds: float) -> None:
        self.now[rank] += seconds
        self.computing[rank] += seconds

    def wait(self, rank: int, until: float) -> None:
        """Stand still until then, and at least as long as what cannot be hidden."""
        self.exposed[rank] += max(0.0, until - self.now[rank])
        self.now[rank] = max(self.now[rank], until)

    def post(self, rank: int) -> float:
        """Post messages; returns when that was done."""
        self.wait(rank, self.now[rank] + self.costs.post)
        return self.now[rank]

    def arrivals(
        self, posted: Sequence[float], receive: Sequence[Iterable[Parcel]], send: Sequence[Iterable[Parcel]], size: float
    ) -> list[float]:
        """When all that a rank posted has come and gone: messages begin when both ends have posted, and share each rank's link."""
        found = []
        for rank, (comes, goes) in enumerate(zip(receive, send, strict=True)):
            ends = [posted[rank]]
            for parcels in (list(comes), list(goes)):
                if parcels:
                    begin = max(posted[p.peer] for p in parcels)
                    ends.append(max(begin, posted[rank]) + self._seconds(rank, parcels, size))
            found.append(max(ends))
        return found

    def _seconds(self, rank: int, parcels: list[Parcel], size: float) -> float:
        """Of messages one way; those over different links go side by side."""
        by_link: dict[Link, float] = {}
        for p in parcels:
            link = self.costs.link(rank, p.peer)
            by_link[link] = by_link.get(link, 0.0) + width(p.spans) * size
        return max(link.seconds(size) for link, size in by_link.items())

    def times(self) -> Times:
        return Times(max(self.now), tuple(self.computing), tuple(self.exposed))


def forward(plans: Sequence[Plan], costs: Costs) -> Times:
    """Of `loop.forward` on all ranks, which begin together. Plans: one of each rank, by rank."""
    clocks, hops = _Clocks(len(plans), costs), _hops(plans)
    coming = _post(clocks, hops, 0, costs.keys)
    for rank, plan in enumerate(plans):
        _work(clocks, rank, (plan.home,), costs, coming)
    for number in range(len(hops)):
        _arrive(clocks, coming)
        coming = _post(clocks, hops, number + 1, costs.keys)
        for rank, hop in enumerate(hops[number]):
            _work(clocks, rank, hop.visits, costs, coming)
    return clocks.times()


def backward(plans: Sequence[Plan], costs: Costs) -> Times:
    """Of `loop.backward`: home is computed in two parts, before the first hop and after the last, as long as their messages; large visits
    in steps, whose gradients leave one by one."""
    clocks, hops = _Clocks(len(plans), costs), _hops(plans)
    ranks = range(len(plans))
    steps = [[steps_of(hop, least_tokens(costs.grads)) for hop in some] for some in hops]
    coming = _post(clocks, hops, 0, costs.keys)
    first = [early(costs.keys, costs.grads, len(steps[-1][rank])) if hops else 1.0 for rank in ranks]
    for rank, plan in enumerate(plans):
        _compute(clocks, rank, first[rank] * costs.work(rank, plan.home), coming[rank])
    under_way: deque[list[float]] = deque()
    for number in range(len(hops)):
        _arrive(clocks, coming)
        coming = _post(clocks, hops, number + 1, costs.keys)
        together = list(zip_longest(*steps[number], fillvalue=Hop()))
        for step in together:
            for rank, hop in enumerate(step):
                _work(clocks, rank, hop.visits, costs, coming)
            while len(under_way) >= len(together):
                _arrive(clocks, under_way.popleft())
            under_way.append(_post_grads(clocks, step, under_way[-1] if under_way else clocks.now))
    for rank, plan in enumerate(plans):
        _compute(clocks, rank, (1 - first[rank]) * costs.work(rank, plan.home), under_way[-1][rank] if under_way else clocks.now[rank])
    for homeward in under_way:
        _arrive(clocks, homeward)
    return clocks.times()


def _post_grads(clocks: _Clocks, step: Sequence[Hop], before: Sequence[float]) -> list[float]:
    """Post the gradients of a step on every rank; returns when they will have moved, after those posted before."""
    posted = [clocks.post(rank) if hop.grads_receive or hop.visits else clocks.now[rank] for rank, hop in enumerate(step)]
    begun = [max(pair) for pair in zip(posted, before, strict=True)]
    send = [[Parcel(v.grads_to, v.owner, v.spans) for v in hop.visits if v.grads_to is not None] for hop in step]
    return clocks.arrivals(begun, [hop.grads_receive for hop in step], send, clocks.costs.grads)


def _hops(plans: Sequence[Plan]) -> list[list[Hop]]:
    """By number, the hop of every rank; an empty one where a rank has fewer."""
    most = max(len(plan.hops) for plan in plans)
    return [[plan.hops[n] if n < len(plan.hops) else Hop() for plan in plans] for n in range(most)]


def _post(clocks: _Clocks, hops: list[list[Hop]], number: int, size: float) -> list[float]:
    """Post a hop's keys on every rank; returns when they will have moved."""
    if number >= len(hops):
        return list(clocks.now)
    posted = [clocks.post(rank) if hop.receive or hop.send else clocks.now[rank] for rank, hop in enumerate(hops[number])]
    return clocks.arrivals(posted, [hop.receive for hop in hops[number]], [hop.send for hop in hops[number]], size)


def _work(clocks: _Clocks, rank: int, visits: Iterable[Visit], costs: Costs, coming: Sequence[float]) -> None:
    _compute(clocks, rank, sum(costs.work(rank, visit) for visit in visits), coming[rank])


def _compute(clocks: _Clocks, rank: int, seconds: float, arrival: float) -> None:
    """Compute under a message that arrives then; where that takes the core, computing takes longer."""
    stolen = (1 - clocks.costs.hidden) * min(seconds, max(0.0, arrival - clocks.now[rank]))
    clocks.compute(rank, seconds)
    clocks.wait(rank, clocks.now[rank] + stolen)


def _arrive(clocks: _Clocks, moments: Sequence[float]) -> None:
    for rank, moment in enumerate(moments):
        clocks.wait(rank, moment)
