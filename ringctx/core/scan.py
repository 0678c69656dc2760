"""Scan: for every chunk of queries, the sum of what all earlier (or later) chunks gave to the keys that it sees.

Each rank has what its own chunks gave. A key's owner gets it from everybody, sums chunk by chunk, and sends back to each chunk the
sum so far: two exchanges, 4 bytes (8 for fp64) a chunk and key that it sees, each way.
Letters: b batch, n keys of one owner, m keys of one owner that the chunks of one rank see, chunk after chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ringctx.core.carry import Order
from ringctx.core.ring import Message, Ring
from ringctx.core.tiles import Spans, width
from ringctx.core.transport import cut

KIND = "carries"


class Packed:
    """For one rank's chunks and one owner, a number per key that a chunk sees: (b m)."""

    def __init__(self, order: Order, rank: int, owner: int, data: Tensor) -> None:
        self.order, self.owner, self.data, self.at = order, owner, data, {}
        at = 0
        for chunk in order.mine(rank):
            self.at[chunk] = (at, at := at + width(order.spans[chunk][owner]))

    @classmethod
    def zeros(cls, order: Order, rank: int, owner: int, like: Tensor) -> Packed:
        """Nothing given yet; like: (b ...) of the dtype and device."""
        m = sum(width(order.spans[chunk][owner]) for chunk in order.mine(rank))
        return cls(order, rank, owner, like.new_zeros(like.shape[0], m))

    def chunk(self, number: int) -> Tensor:
        """A view of one chunk's numbers, (b m')."""
        return self.data[:, slice(*self.at[number])]

    def spread(self, number: int, spans: Spans) -> Tensor:
        """One chunk's numbers at the owner's keys `spans`, 0 where the chunk sees none: (b, width of spans)."""
        return spread(self.chunk(number), self.order.spans[number][self.owner], spans)

    def put(self, number: int, x: Tensor, spans: Spans) -> None:
        """Take one chunk's numbers from x (b, width of spans), at the owner's keys `spans`."""
        self.chunk(number).copy_(spread(x, spans, self.order.spans[number][self.owner]))


def spread(x: Tensor, have: Spans, want: Spans) -> Tensor:
    """x (b, width of have) at local positions `have`, as (b, width of want) at `want`; 0 where x has nothing."""
    if have == want:
        return x.clone()
    end = max([b for _, b in (*have, *want)], default=0)
    whole, at = x.new_zeros(x.shape[0], end), 0
    for a, b in have:
        whole[:, a:b] = x[:, at : at + b - a]
        at += b - a
    return cut((whole,), want)[0] if want else whole[:, :0]


def scan(ring: Ring, order: Order, mine: Sequence[Packed], start: Tensor, *, reverse: bool = False) -> tuple[list[Packed], Tensor]:
    """What all earlier chunks (later ones with reverse) gave, `start` (b n) of this rank's keys included, and the sum of all (b n).

    mine: by owner, what this rank's chunks gave. All ranks call it together.
    """
    theirs = _trade(ring, order, mine, "to owners", to_owners=True)
    total = start.clone()
    for number in reversed(range(len(order.chunks))) if reverse else range(len(order.chunks)):
        spans, part = order.spans[number][ring.rank], theirs[order.chunks[number].rank].chunk(number)
        at = 0
        for a, b in spans:
            given = part[:, at : at + b - a].clone()
            part[:, at : at + b - a] = total[:, a:b]
            total[:, a:b] += given
            at += b - a
    return _trade(ring, order, theirs, "to chunks", to_owners=False), total


def _trade(ring: Ring, order: Order, parts: Sequence[Packed], what: str, *, to_owners: bool) -> list[Packed]:
    """Send each rank its part and take in one's own. To owners: by owner in, by rank of the chunks out; to chunks: the way back."""
    me = ring.rank

    def room(other: int) -> Packed:
        rank, owner = (other, me) if to_owners else (me, other)
        return Packed.zeros(order, rank, owner, parts[me].data)

    taken = [parts[me] if other == me else room(other) for other in range(ring.size)]
    others = [(me + n) % ring.size for n in range(1, ring.size)]
    receive = [Message(other, (taken[other].data,)) for other in others]
    send = [Message(other, (parts[other].data,)) for other in others]
    ring.exchange(KIND, f"carries {what}", receive, send).wait()
    return taken
