"""The ring with a carry: what keys were given by earlier queries goes with them, or is summed before they go.

Forward in one pass where keys meet chunks of queries in ascending order (a contiguous layout): the sums ride one hop behind the
keys, late, after this rank's queries have given theirs. Elsewhere in two: head 0's keys go round alone, a scan over chunks sums what
was given, and the ordinary ring follows. Backward is one ordinary ring that takes no later chunk into account, a scan of what each
chunk took, and a correction of head 0, in which the gradient is linear in what later chunks took.
Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703); both ring algorithms and the correction are ours.
Letters: b batch, s query tokens here, n key tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.carried import CarriedWork, Meeting, Rows, strips
from ringctx.core.carry import Order, in_turn, order_of, without_last
from ringctx.core.layout import Layout
from ringctx.core.plan import Plan, Visit, make_plan
from ringctx.core.ring import Message, Pending, Ring
from ringctx.core.scan import KIND, Packed, scan, spread
from ringctx.core.sums import Sum
from ringctx.core.tiles import union, width
from ringctx.core.transport import Homeward, visits
from ringctx.kernels.base import accumulation_dtype


@dataclass(frozen=True)
class Way:
    """Where the tokens of one call live and how they travel."""

    ring: Ring
    layout: Layout
    key_layout: Layout
    plan: Plan
    work: CarriedWork

    @property
    def order(self) -> Order:
        """In which order queries meet keys."""
        return order_of(self.work.attention.pattern, self.layout, self.key_layout)

    @property
    def mine(self) -> tuple[int, ...]:
        """This rank's chunks."""
        return self.order.mine(self.plan.rank)

    def one_pass(self, has_start: bool) -> bool:
        """Whether sums ride with the keys. What was carried before the call lies with the owners: on several ranks it is scanned."""
        alone = self.ring.size == 1
        return alone or (not has_start and in_turn(self.order, self.layout, self.key_layout, self.plan.transport, self.ring.nodes))

    def shorter(self, all_of_it: bool) -> Way:
        """The same with the last chunk left out, whose queries nobody comes after; unless somebody wants to know it all."""
        layout = self.layout if all_of_it else without_last(self.layout)
        plan = make_plan((self.work.attention.pattern,), layout, self.key_layout, self.plan.rank, self.plan.transport, self.ring.nodes)
        return Way(self.ring, layout, self.key_layout, plan, self.work)

    def meeting(self, visit: Visit, q: Tensor, k: Tensor, v: Tensor | None) -> Meeting:
        return Meeting.of(self.work, q, self.layout.spans[self.plan.rank], k, v, visit.ranges)

    def nothing(self, q: Tensor) -> list[Packed]:
        """By owner, zeros for this rank's chunks."""
        like = q.new_empty(q.shape[0], 0, dtype=accumulation_dtype(q.dtype))
        return [Packed.zeros(self.order, self.plan.rank, owner, like) for owner in range(self.ring.size)]

    def packed(self, parts: list[Tensor]) -> list[Packed]:
        """What `nothing` gives, of tensors that were kept."""
        return [Packed(self.order, self.plan.rank, owner, part) for owner, part in enumerate(parts)]


def kept_sizes(way: Way) -> list[int]:
    """How many numbers per batch row forward keeps for each owner's keys."""
    spans = way.order.spans
    return [sum(width(spans[chunk][owner]) for chunk in way.mine) for owner in range(way.ring.size)]


def forward(
    way: Way, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, measure: bool
) -> tuple[Tensor, Tensor, Tensor, list[Packed], Tensor]:
    """out (b s h e), lse (b s h), memory (b s) or empty, what keys carried at each meeting, and what they carry now (b n).

    start (b n): what this rank's keys carried before. Where nobody gave one, the last result is not the sum of all on several ranks.
    """
    work, order, rank = way.work, way.order, way.plan.rank
    like = q.new_zeros(q.shape[0], k.shape[1], dtype=accumulation_dtype(q.dtype))
    begin = like if start is None else start.clone()
    relay = Relay(way, begin) if way.one_pass(start is not None) else None
    met, now = (way.nothing(q), begin) if relay else _first_pass(way, q, k, begin, start is not None)
    totals = work.empty(q, v.shape[3])
    memory = like.new_zeros(q.shape[:2]) if measure else None
    for _, present in visits(way.plan, way.ring, (k, v)):
        while present:
            visit, block = present.pop(0)
            meeting, sums = way.meeting(visit, q, *block), relay.arrive(visit) if relay else None
            for chunk in way.mine:
                if relay is None:
                    sums = met[visit.owner].spread(chunk, visit.spans)
                else:
                    assert sums is not None
                    met[visit.owner].put(chunk, sums, visit.spans)
                work.attend(totals[0], memory, meeting, strips(visit.tiles[0], order.chunks[chunk]), sums)
            if relay and sums is not None:
                relay.leave(visit, sums)
                now = sums if visit.owner == rank else now
            del block, meeting
    if relay:
        relay.finish()
    out, lse = work.whole(totals, q, v.shape[3])
    return out, lse, like.new_empty(0) if memory is None else memory, met, now


def _first_pass(way: Way, q: Tensor, k: Tensor, start: Tensor, has_start: bool) -> tuple[list[Packed], Tensor]:
    """What keys carry when this rank's chunks meet them, and after all chunks: head 0's keys go round alone."""
    some, given = way.shorter(has_start), way.nothing(q)
    for _, present in visits(some.plan, way.ring, (k[:, :, :1].contiguous(),)):
        for visit, block in present:
            meeting = some.meeting(visit, q, block[0], None)
            for chunk, number in _shared(some, way):
                sums = start.new_zeros(q.shape[0], width(visit.spans))
                way.work.give(meeting, strips(visit.tiles[0], some.order.chunks[chunk]), sums)
                given[visit.owner].put(number, sums, visit.spans)
    return scan(way.ring, way.order, given, start)


def _shared(some: Way, way: Way) -> list[tuple[int, int]]:
    """This rank's chunks of the shorter way: their number there and in the whole way."""
    return [(chunk, next(n for n in way.mine if way.order.chunks[n] == some.order.chunks[chunk])) for chunk in some.mine]


def backward(way: Way, rows: Rows, k: Tensor, v: Tensor, met: list[Packed]) -> tuple[Sum, Sum, Sum]:
    """dq (b s h d), dk (b n g d), dv (b n g e); met: what forward said that keys carried. Params' gradients are left in work."""
    work, plan, order = way.work, way.plan, way.order
    q = rows[1]
    dq, dk, dv = Sum(q), Sum(k), Sum(v)
    homeward, took = Homeward(plan, way.ring, (dk, dv)), way.nothing(q)

    def retreat(grads: tuple[Sum, Sum, Sum], visit: Visit, block: tuple[Tensor, ...], chunks: tuple[int, ...]) -> None:
        meeting = way.meeting(visit, q, *block)
        for chunk in chunks:
            sums = met[visit.owner].spread(chunk, visit.spans)
            later = work.retreat(grads, rows, meeting, strips(visit.tiles[0], order.chunks[chunk]), sums)
            took[visit.owner].put(chunk, later, visit.spans)

    early = -(-len(way.mine) // 2) if plan.hops else len(way.mine)  # the last gradients travel under the other half's work
    for number, present in visits(plan, way.ring, (k, v)):
        if number == 0:
            retreat((dq, dk, dv), plan.home, (k, v), way.mine[:early])
            continue
        done = []
        while present:
            visit, block = present.pop(0)
            grads = Sum(block[0]), Sum(block[1])
            retreat((dq, *grads), visit, block, way.mine)
            done.append((visit, grads))
            del block
        homeward.hop(number, done)
    retreat((dq, dk, dv), plan.home, (k, v), way.mine[early:])
    homeward.finish()
    later, _ = scan(way.ring, order, took, took[0].data.new_zeros(q.shape[0], k.shape[1]), reverse=True)
    _correct(way, dq, dk, q, k, later)
    return dq, dk, dv


def _correct(way: Way, dq: Sum, dk: Sum, q: Tensor, k: Tensor, later: list[Packed]) -> None:
    """Add what later chunks took to head 0's gradients: its keys go round once more, and their gradients come home."""
    some = way.shorter(False)
    first = k[:, :, :1].contiguous()
    own = Sum(first)
    homeward = Homeward(some.plan, way.ring, (own,))
    for number, present in visits(some.plan, way.ring, (first,)):
        done = []
        for visit, block in present:
            total = own if number == 0 else Sum(block[0])
            meeting = some.meeting(visit, q, block[0], None)
            for chunk, whole in _shared(some, way):
                took = later[visit.owner].spread(whole, visit.spans)
                way.work.correct(dq, total, meeting, strips(visit.tiles[0], some.order.chunks[chunk]), took)
            done.append((visit, (total,)))
        if number:
            homeward.hop(number, done)
    homeward.finish()
    dk.add(own.wide(), (0, k.shape[1]), (0,))


class Relay:
    """Sums that ride with visiting keys from chunk to chunk, each owner's along its own chain of ranks.

    They travel over the gradients' communicator, which forward leaves free, so that they never wait in the keys' line.
    """

    def __init__(self, way: Way, begin: Tensor) -> None:
        self.ring, self.rank, self.begin = way.ring, way.plan.rank, begin
        chunks, spans = way.order.chunks, way.order.spans
        owners = range(way.ring.size)
        self.chains = [tuple(dict.fromkeys(c.rank for c, seen in zip(chunks, spans, strict=True) if seen[o])) for o in owners]
        self.carried = [union([seen[o] for c, seen in zip(chunks, spans, strict=True) if c.rank != o]) for o in owners]
        self.riding: Tensor | None = None
        self.sent: list[Pending] = []

    def arrive(self, visit: Visit) -> Tensor:
        """What the visiting keys carry, (b, n)."""
        owner, chain = visit.owner, self.chains[visit.owner]
        self.riding = None
        if owner == self.rank:
            return self.begin.clone()
        at = chain.index(self.rank) if self.rank in chain else 0
        self.riding = self.begin.new_zeros(self.begin.shape[0], width(self.carried[owner]))
        if at > 0:
            what = f"carries of rank {owner}'s keys"
            self.ring.exchange(KIND, what, [Message(chain[at - 1], (self.riding,))], grads=True).wait()
        return spread(self.riding, self.carried[owner], visit.spans)

    def leave(self, visit: Visit, sums: Tensor) -> None:
        """Send what the visiting keys carry now to the next rank of their chain."""
        owner, chain = visit.owner, self.chains[visit.owner]
        if self.rank not in chain[:-1]:
            return
        onward = spread(sums, visit.spans, self.carried[owner])
        if self.riding is not None and visit.spans != self.carried[owner]:
            met = spread(torch.ones_like(sums), visit.spans, self.carried[owner]) > 0
            onward = torch.where(met, onward, self.riding)
        message = Message(chain[chain.index(self.rank) + 1], (onward.contiguous(),))
        self.sent.append(self.ring.exchange(KIND, f"carries of rank {owner}'s keys", send=[message], grads=True))

    def finish(self) -> None:
        """Wait for what is under way."""
        for pending in self.sent:
            pending.wait()
