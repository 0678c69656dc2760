"""Floors: what a call would take if its messages were there at once, and what its messages take if nothing is computed.

Knows rings and plans. The first is the call itself on a ring that sends nothing; the second follows the plan and computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.plan import make_plan
from ringctx.core.ring import Message, Pending, Ring
from ringctx.core.sums import Sum
from ringctx.core.timeline import Timeline
from ringctx.core.transport import Homeward, visits

FILLED = 0.5
"""What arrives over a silent ring: kernels take as long for any number, but not for what is left in fresh memory."""
MOVED = ("keys", "grads", "queries", "partials", "heads")
"""The kinds of messages that carry attention; a header only waits for who is late."""


class Silent(Ring):
    """The same ranks, but nothing is sent: what is received is FILLED, at once."""

    @classmethod
    def like(cls, ring: Ring) -> Silent:
        """Folded as `ring`."""
        return cls(ring.group, grads=ring.grads, heads=ring.heads, nodes=ring.nodes, timeout=ring.timeout, strict=False)

    def exchange(
        self, kind: str, what: str, receive: Sequence[Message] = (), send: Sequence[Message] = (), *, grads: bool = False, tag: int = 0
    ) -> Pending:
        """Nothing to wait for."""
        for message in receive:
            for tensor in message.tensors:
                tensor.fill_(FILLED)
        return Pending(self, what, (), ())


def send_only(ring: Ring, layout: Layout, pattern: Pattern, transport: str, k: Tensor, v: Tensor, *, backward: bool) -> None:
    """The messages of keys k, v (b s g .), and with backward those of keys and gradients. All ranks must call it together.

    Where the transport moves keys alone: rotate, fetch and gather.
    """
    plan = make_plan((pattern,), layout, layout, ring.rank, transport, ring.nodes)
    homeward = Homeward(plan, ring, (Sum(k), Sum(v)))
    for number, present in visits(plan, ring, (k, v)):
        if backward and number:
            homeward.hop(number, [(visit, (Sum(block[0]), Sum(block[1]))) for visit, block in present])
        present.clear()
    homeward.finish()


def exposed(timeline: Timeline) -> tuple[float, float]:
    """Seconds that posting and waiting for what carries attention took, and nothing hid: in calls forward, and in those backward."""
    found = dict.fromkeys(("forward", "backward"), 0.0)
    journeys = timeline.journeys()
    for what, call in timeline.calls():
        for one in journeys:
            if one.kind in MOVED and what in found and call.began <= one.posting.began <= call.ended:
                found[what] += one.posting.seconds + one.waiting.seconds
    return found["forward"], found["backward"]
