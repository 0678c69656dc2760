"""The loop that moves keys: post the next hop, hand out the visit, follow the plan; and gradients on their way home.

Knows plans, rings and tensors. Knows nothing of masks or kernels. Rotate, fetch and gather all run here; what differs
between them is in the plan. Letters: b batch, n tokens, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringctx.core.plan import Hop, Parcel, Plan, Visit
from ringctx.core.ring import Message, Pending, Ring
from ringctx.core.sums import Sum
from ringctx.core.tiles import Spans, width

Tensors = tuple[Tensor, ...]
Sums = tuple[Sum, ...]


def cut(tensors: Tensors, spans: Spans) -> Tensors:
    """The tokens (dim 1) at these local positions, contiguous; the tensors themselves when that is all of them."""
    if len(spans) == 1 and spans[0] == (0, tensors[0].shape[1]):
        return tuple(t.contiguous() for t in tensors)
    return tuple(torch.cat([t[:, a:b] for a, b in spans], 1) for t in tensors)


def room(like: Tensors, tokens: int) -> Tensors:
    """Fresh memory for a message of this many tokens; every visiting block is allocated here."""
    return tuple(t.new_empty(t.shape[0], tokens, *t.shape[2:]) for t in like)


def visits(plan: Plan, ring: Ring, tensors: Tensors) -> Iterator[tuple[int, list[tuple[Visit, Tensors]]]]:
    """Yield (hop number, the visits of that hop with their tensors): home is hop 0; the next hop is already under way.

    tensors: this rank's own keys and values, each (b n g .). Consume it to the end: peers wait for what is sent here.
    """
    arriving, pending = _post(plan, ring, 1, tensors, {})
    yield 0, [(plan.home, tensors)]
    for number, hop in enumerate(plan.hops, 1):
        pending.wait()
        held = arriving
        arriving, pending = _post(plan, ring, number + 1, tensors, held)
        yield number, [(visit, held[visit.owner]) for visit in hop.visits]


def _post(plan: Plan, ring: Ring, number: int, own: Tensors, held: dict[int, Tensors]) -> tuple[dict[int, Tensors], Pending]:
    hop = plan.hops[number - 1] if number <= len(plan.hops) else Hop()
    arriving = {p.owner: room(own, width(p.spans)) for p in hop.receive}
    receive = [Message(p.peer, arriving[p.owner]) for p in hop.receive]
    send = [Message(p.peer, held[p.owner] if p.owner != plan.rank else cut(own, p.spans)) for p in hop.send]
    return arriving, ring.exchange("keys", f"keys at hop {number}", receive, send)


class Homeward:
    """Gradients of visiting keys: each joins those that arrived for the same keys, and goes on as the plan says."""

    def __init__(self, plan: Plan, ring: Ring, own: Sums) -> None:
        self.plan, self.ring, self.own = plan, ring, own
        self.waiting: dict[tuple[int, Spans], Tensors] = {}
        self.under_way: deque[tuple[Pending, list[tuple[Parcel, Tensors]]]] = deque()

    def hop(self, number: int, done: Sequence[tuple[Visit, Sums]]) -> None:
        """After all of hop `number` is computed: take in what came of the hop before, send this hop's gradients on."""
        self.step(number, self.plan.hops[number - 1].grads_receive, done)

    def step(self, number: int, receive: Sequence[Parcel], done: Sequence[tuple[Visit, Sums]], ahead: int = 1) -> None:
        """After a part of hop `number` is computed: send its gradients on, and make room for as many.

        ahead: the gradients of so many steps travel at most; those of earlier ones are waited for and taken in.
        """
        while len(self.under_way) >= ahead:
            self._arrive()
        send: list[Message] = []
        for visit, grads in done:
            if visit.grads_from is not None:
                while (visit.owner, visit.spans) not in self.waiting:
                    self._arrive()
                _add(grads, self.waiting.pop((visit.owner, visit.spans)))
            assert visit.grads_to is not None
            send.append(Message(visit.grads_to, tuple(g.wide() for g in grads)))
        arriving = [(p, tuple(total.room(width(p.spans)) for total in self.own)) for p in receive]
        messages = [Message(p.peer, tensors) for p, tensors in arriving]
        self.under_way.append((self.ring.exchange("grads", f"gradients at hop {number}", messages, send, grads=True), arriving))

    def finish(self) -> None:
        """Wait for what is under way, and add what has come home to this rank's own gradients."""
        while self.under_way:
            self._arrive()

    def _arrive(self) -> None:
        pending, arriving = self.under_way.popleft()
        pending.wait()
        while arriving:  # emptied, so that what has been added is let go
            parcel, tensors = arriving.pop(0)
            if parcel.owner == self.plan.rank:
                _add(self.own, tensors, parcel.spans)
            else:
                self.waiting[parcel.owner, parcel.spans] = tensors


def _add(totals: Sums, parts: Tensors, spans: Spans | None = None) -> None:
    """totals += parts; with spans, the parts are those tokens of the totals."""
    for total, part in zip(totals, parts, strict=True):
        if spans is None:
            total.add(part)
            continue
        at = 0
        for a, b in spans:
            total.add(part[:, at : at + b - a], (a, b))
            at += b - a
