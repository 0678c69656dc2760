"""Heads for tokens: inside a head group, ranks trade tokens of all heads for all the group's tokens of some heads.

Knows layouts, heads and messages. Knows nothing of masks or kernels. A group of the whole ring is Ulysses (Jacobs et al.
2023); a group of part of it, with a ring between the groups, is USP (Fang & Zhao 2024). Heads may split unevenly, and a
key head goes to every rank that has a query head for it.
Letters: b batch, s tokens on this rank, m tokens of the whole group, h query heads, g key heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.core.layout import Layout, Ranges, indices_of, ranges_of
from ringctx.core.ring import Message, Pending, Ring

MOST_RUNS = 16  # copied one by one; beyond it, an index is faster


@dataclass(frozen=True)
class Trade:
    """Tokens of one layout traded inside a head group.

    inner: the layout between groups, in which this group is rank `circle`. counts and places: for each member of the group,
    how many tokens it owns, and where they lie among the group's tokens in ascending order.
    """

    inner: Layout
    circle: int
    counts: tuple[int, ...]
    places: tuple[Ranges, ...]


@lru_cache(maxsize=512)
def make_trade(layout: Layout, heads: int, rank: int) -> Trade:
    """Consecutive ranks form groups of `heads`."""
    groups = [range(c, c + heads) for c in range(0, layout.size, heads)]
    merged = [torch.cat([layout.indices(r) for r in group]) for group in groups]
    circle = rank // heads
    order = merged[circle].argsort()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    counts = tuple(layout.count(r) for r in groups[circle])
    runs = tuple(_runs(p) for p in places.split(list(counts)))
    return Trade(Layout(tuple(ranges_of(m.sort().values) for m in merged)), circle, counts, runs)


def _runs(places: Tensor) -> Ranges:
    """Places in local order as ranges: ascending stretches of unit step, or one range of equal steps."""
    if bool((places.diff() > 0).all()):
        return ranges_of(places)
    breaks = (places.diff() != 1).nonzero().flatten() + 1
    return tuple(range(int(p[0]), int(p[-1]) + 1) for p in torch.tensor_split(places, breaks.tolist()) if len(p))


def shares(num_heads: int, num_key_heads: int, members: int) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """For each member of a head group, its query heads and the key heads these read."""
    ratio = num_heads // num_key_heads
    q = tuple(range(num_heads * m // members, num_heads * (m + 1) // members) for m in range(members))
    return q, tuple(range(x[0] // ratio, x[-1] // ratio + 1) if x else range(0) for x in q)


@dataclass(frozen=True)
class Traded:
    """A tensor to trade: (b s h .) with all heads, or (b m h' .) with one member's; heads has every member's share."""

    x: Tensor
    heads: tuple[range, ...]
    trade: Trade

    @property
    def shared(self) -> bool:
        """Whether some head lives on several members."""
        return sum(map(len, self.heads)) > self.heads[-1].stop  # the last member always has some

    def whole_shape(self, member: int) -> tuple[int, ...]:
        """(b s h .): a member's tokens with all heads."""
        return (self.x.shape[0], self.trade.counts[member], self.heads[-1].stop, *self.x.shape[3:])


class HeadGroupExchange:
    """The all-to-all inside this rank's head group, both ways. Tensors traded together share one wait."""

    def __init__(self, ring: Ring, members: int) -> None:
        self.ring, self.members = ring, members
        self.first = ring.rank // members * members
        self.me = ring.rank - self.first
        self.others = [(self.me + n) % members for n in range(1, members)]

    def to_heads(self, what: str, *items: Traded) -> list[Tensor]:
        """Each x (b s h .) of all heads -> (b m h' .), the group's tokens in ascending order, of this member's heads."""
        part = lambda item, m: item.x[:, :, item.heads[m].start : item.heads[m].stop]
        come = {m: Packed([_shape(item, item.trade.counts[m], self.me) for item in items]) for m in self.others}
        leave = {m: Packed([_shape(item, item.x.shape[1], m) for item in items]) for m in self.others}
        for m, packed in leave.items():
            for view, item in zip(packed.views, items, strict=True):
                view.copy_(part(item, m))
        pending = self._trade(what, come, leave)
        wholes = [item.x.new_empty(_shape(item, sum(item.trade.counts), self.me)[0]) for item in items]
        for whole, item in zip(wholes, items, strict=True):
            _lay(whole, part(item, self.me), item.trade.places[self.me])
        pending.wait()
        for m, packed in come.items():
            for whole, item, block in zip(wholes, items, packed.views, strict=True):
                _lay(whole, block, item.trade.places[m])
        return wholes

    def to_tokens(self, what: str, *items: Traded) -> list[Tensor]:
        """Each x (b m h' .) of this member's heads -> (b s h .) of all heads; heads that several members had are summed."""
        come = {m: Packed([_shape(item, item.trade.counts[self.me], m) for item in items]) for m in self.others}
        leave = {m: Packed([_shape(item, item.trade.counts[m], self.me) for item in items]) for m in self.others}
        for m, packed in leave.items():
            for view, item in zip(packed.views, items, strict=True):
                _pick_up(item.x, item.trade.places[m], view)
        pending = self._trade(what, come, leave)
        wholes = [(item.x.new_zeros if item.shared else item.x.new_empty)(item.whole_shape(self.me)) for item in items]
        for whole, item in zip(wholes, items, strict=True):
            _pick_up(item.x, item.trade.places[self.me], whole[:, :, item.heads[self.me].start : item.heads[self.me].stop])
        pending.wait()
        for m, packed in come.items():
            for whole, item, block in zip(wholes, items, packed.views, strict=True):
                theirs = whole[:, :, item.heads[m].start : item.heads[m].stop]
                if item.shared:
                    theirs += block
                else:
                    theirs.copy_(block)
        return wholes

    def _trade(self, what: str, come: dict[int, Packed], leave: dict[int, Packed]) -> Pending:
        messages = lambda parts: [Message(self.first + m, (packed.bytes,)) for m, packed in parts.items()]
        return self.ring.exchange("heads", what, messages(come), messages(leave))


class Packed:
    """Fresh memory for several tensors that travel as one message: every message costs two threads a wake-up."""

    def __init__(self, shapes: list[tuple[tuple[int, ...], torch.dtype, torch.device]]) -> None:
        widest_first = sorted(range(len(shapes)), key=lambda n: -shapes[n][1].itemsize)  # so that each begins aligned
        sizes = [math.prod(shapes[n][0]) * shapes[n][1].itemsize for n in widest_first]
        self.bytes = torch.empty(sum(sizes), dtype=torch.uint8, device=shapes[0][2])
        parts = dict(zip(widest_first, self.bytes.split(sizes), strict=True))
        self.views = [parts[n].view(dtype).view(shape) for n, (shape, dtype, _) in enumerate(shapes)]


def _shape(item: Traded, tokens: int, member: int) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Of so many tokens with one member's heads."""
    x = item.x
    return (x.shape[0], tokens, len(item.heads[member]), *x.shape[3:]), x.dtype, x.device


def _lay(whole: Tensor, block: Tensor, runs: Ranges) -> None:
    """whole[:, places] = block."""
    if len(runs) > MOST_RUNS:
        whole.index_copy_(1, indices_of(runs, whole.device), block)
        return
    at = 0
    for run in runs:
        whole[:, run.start : run.stop : run.step] = block[:, at : at + len(run)]
        at += len(run)


def _pick_up(whole: Tensor, runs: Ranges, block: Tensor) -> None:
    """block = whole[:, places]."""
    if len(runs) > MOST_RUNS:
        block.copy_(whole.index_select(1, indices_of(runs, whole.device)))
        return
    at = 0
    for run in runs:
        block[:, at : at + len(run)] = whole[:, run.start : run.stop : run.step]
        at += len(run)
