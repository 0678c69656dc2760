"""Pass-Q: queries visit the keys, and partials go home; no key moves. For few queries against many cached keys.

Source: Yang et al. 2024 (arXiv 2411.01783), with direct messages instead of a ring: only ranks whose keys are seen are asked.
Letters: b batch, s query tokens, h query heads, e value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.core.compute import Work
from ringctx.core.layout import Layout
from ringctx.core.partial import Partial
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Message, Ring
from ringctx.core.sums import Sum
from ringctx.core.tiles import Tile, area, tiles
from ringctx.kernels.base import accumulation_dtype

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class QueryPlan:
    """Which ranks' queries visit this rank, with their tiles, and which ranks this rank's queries visit.

    guests and hosts run over hops 1..size-1: hop n asks rank + n and serves rank - n; None where nothing is seen.
    """

    rank: int
    home: tuple[tuple[Tile, ...], ...]
    guests: tuple[tuple[int, tuple[tuple[Tile, ...], ...]] | None, ...]
    hosts: tuple[int | None, ...]

    @property
    def all_tiles(self) -> tuple[tuple[tuple[Tile, ...], ...], ...]:
        """The tiles of home and of every guest, each by head group."""
        return (self.home, *(g[1] for g in self.guests if g))

    @property
    def cost(self) -> int:
        """Query-key pairs this rank computes."""
        return sum(area(rows) for group in self.all_tiles for rows in group)

    def explain(self) -> str:
        """Who is asked and who is served."""
        hosts = [str(r) for r in self.hosts if r is not None] or ["no"]
        guests = [str(g[0]) for g in self.guests if g] or ["no"]
        asked, served = " ".join(hosts), " ".join(guests)
        return f"rank {self.rank}, pass_q: sends its queries to rank {asked}, serves rank {served}, {self.cost:,} query-key pairs"


@lru_cache(maxsize=512)
def make_query_plan(patterns: tuple[Pattern, ...], layout: Layout, key_layout: Layout, rank: int) -> QueryPlan:
    """The pass-Q plan of one rank; patterns has one entry for each group of heads."""
    seen = lambda p, o: tuple(tiles(x, layout.spans[p], key_layout.spans[o]) for x in patterns)
    guests: list[tuple[int, tuple[tuple[Tile, ...], ...]] | None] = []
    hosts: list[int | None] = []
    for hop in range(1, layout.size):
        left, right = (rank - hop) % layout.size, (rank + hop) % layout.size
        theirs = seen(left, rank)
        guests.append((left, theirs) if any(theirs) else None)
        hosts.append(right if any(seen(rank, right)) else None)
    return QueryPlan(rank, seen(rank, rank), tuple(guests), tuple(hosts))


def _rounds(plan: QueryPlan, ring: Ring, layout: Layout, queries: Tensors):  # type: ignore[no-untyped-def]
    """Yield None for home, then each guest with its queries' tensors, the next being under way; None where there is none."""

    def post(number: int):  # type: ignore[no-untyped-def]
        guest = plan.guests[number] if number < len(plan.guests) else None
        host = plan.hosts[number] if number < len(plan.hosts) else None
        here = tuple(t.new_empty(t.shape[0], layout.count(guest[0]), *t.shape[2:]) for t in queries) if guest else ()
        receive = [Message(guest[0], here)] if guest else []
        send = [Message(host, queries)] if host is not None else []
        return here, ring.exchange("queries", f"queries at hop {number + 1}", receive, send)

    here, pending = post(0)
    yield None, ()
    for number, guest in enumerate(plan.guests):
        pending.wait()
        now = here
        here, pending = post(number + 1)
        yield guest, now
    pending.wait()


def forward(
    work: Work, plan: QueryPlan, ring: Ring, layout: Layout, key_layout: Layout, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out (b s h e) in q's dtype and lse (b s h) for this rank's queries over all keys of the ring."""
    keys, e = key_layout.spans[plan.rank], v.shape[3]
    totals = work.empty(q, e)
    returns = _Returns(plan, ring, lambda: [torch.empty_like(x) for t in totals for x in (t.out, t.lse)])
    for number, (guest, tensors) in enumerate(_rounds(plan, ring, layout, (q.contiguous(),))):
        if number == 0:
            work.forward(totals, plan.home, q, layout.spans[plan.rank], k, v, keys)
            continue
        answer: list[Tensor] = []
        if guest:
            theirs = work.empty(tensors[0], e)
            work.forward(theirs, guest[1], tensors[0], layout.spans[guest[0]], k, v, keys)
            answer = [x for t in theirs for x in (t.out, t.lse)]
        for came in returns.hop(number, answer):
            _merge(totals, came)
    for came in returns.finish():
        _merge(totals, came)
    return work.whole(totals, q, e)


def _merge(totals: list[Partial], came: list[Tensor]) -> None:
    for total, out, lse in zip(totals, came[::2], came[1::2], strict=True):
        total.merge_(out, lse)


def backward(
    work: Work,
    plan: QueryPlan,
    ring: Ring,
    layout: Layout,
    key_layout: Layout,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Sum, Sum, Sum]:
    """dq (b s h d), dk (b n g d), dv (b n g e) as sums; keys and their gradients stay where they are."""
    wide = accumulation_dtype(q.dtype)
    keys = key_layout.spans[plan.rank]
    dq, dk, dv = Sum(q), Sum(k), Sum(v)
    slope = torch.zeros_like(lse) if dlse is None else dlse.to(wide)  # all ranks must send the same tensors
    mine = tuple(x.contiguous() for x in (dout.to(q.dtype), q, out, lse.masked_fill(lse == -torch.inf, 0.0), slope))
    returns = _Returns(plan, ring, lambda: [dq.room(q.shape[1])])
    for number, (guest, tensors) in enumerate(_rounds(plan, ring, layout, mine)):
        if number == 0:
            work.backward((dq, dk, dv), plan.home, (mine[0], mine[1], mine[2], mine[3], dlse), layout.spans[plan.rank], k, v, keys)
            continue
        answer: list[Tensor] = []
        if guest:
            theirs = Sum(tensors[1])
            work.backward(
                (theirs, dk, dv),
                guest[1],
                (tensors[0], tensors[1], tensors[2], tensors[3], tensors[4]),
                layout.spans[guest[0]],
                k,
                v,
                keys,
            )
            answer = [theirs.wide()]
        for came in returns.hop(number, answer):
            dq.add(came[0])
    for came in returns.finish():
        dq.add(came[0])
    return dq, dk, dv


class _Returns:
    """What hosts computed for guests, on its way back."""

    def __init__(self, plan: QueryPlan, ring: Ring, room: Callable[[], list[Tensor]]) -> None:
        self.plan, self.ring, self.room = plan, ring, room
        self.pending, self.came = ring.exchange("partials", "nothing"), list[Tensor]()

    def hop(self, number: int, answer: list[Tensor]) -> list[list[Tensor]]:
        """Send this hop's answer to its guest, and hand over what came back of the hop before."""
        before = self.finish()
        guest, host = self.plan.guests[number - 1], self.plan.hosts[number - 1]
        self.came = self.room() if host is not None else []
        receive = [Message(host, tuple(self.came))] if host is not None else []
        send = [Message(guest[0], tuple(answer))] if guest else []
        self.pending = self.ring.exchange("partials", f"partials at hop {number}", receive, send, grads=True)
        return before

    def finish(self) -> list[list[Tensor]]:
        """Wait for what is under way."""
        self.pending.wait()
        came, self.came = self.came, []
        return [came] if came else []
