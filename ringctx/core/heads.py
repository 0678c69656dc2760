"""Heads for tokens: inside a head group, ranks trade tokens of all heads for all the group's tokens of some heads.

Knows layouts, heads and messages. Knows nothing of masks or kernels. A group of the whole ring is Ulysses (Jacobs et al.
2023); a group of part of it, with a ring between the groups, is USP (Fang & Zhao 2024). Heads may split unevenly, and a
key head goes to every rank that has a query head for it.
Letters: b batch, s tokens on this rank, m tokens of the whole group, h query heads, g key heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.core.layout import Layout, Ranges, indices_of, ranges_of
from ringctx.core.ring import Message, Ring


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


class HeadGroupExchange:
    """The all-to-all inside this rank's head group, both ways."""

    def __init__(self, ring: Ring, members: int) -> None:
        self.ring, self.members = ring, members
        self.first = ring.rank // members * members
        self.me = ring.rank - self.first

    def to_heads(self, x: Tensor, heads: tuple[range, ...], trade: Trade, what: str) -> Tensor:
        """x (b s h .) of all heads -> (b m h' .), the group's tokens in ascending order, of this member's heads."""
        b, tail, mine = x.shape[0], x.shape[3:], heads[self.me]
        part = lambda m: x[:, :, heads[m].start : heads[m].stop].contiguous()
        blocks = [part(self.me) if m == self.me else x.new_empty(b, trade.counts[m], len(mine), *tail) for m in range(self.members)]
        self._trade(what, {m: blocks[m] for m in self._others()}, {m: part(m) for m in self._others()})
        if self.members == 1:
            return blocks[0]
        whole = x.new_empty(b, sum(trade.counts), len(mine), *tail)
        for block, runs in zip(blocks, trade.places, strict=True):
            _lay(whole, block, runs)
        return whole

    def to_tokens(self, x: Tensor, heads: tuple[range, ...], num_heads: int, trade: Trade, what: str) -> Tensor:
        """x (b m h' .) of this member's heads -> (b s h .) of all heads; heads that several members had are summed."""
        b, tail, mine = x.shape[0], x.shape[3:], trade.counts[self.me]
        blocks = [x.new_empty(b, mine, len(heads[m]), *tail) for m in range(self.members)]
        parts = {m: _pick_up(x, trade.places[m], trade.counts[m]) for m in range(self.members)}
        blocks[self.me] = parts.pop(self.me)
        self._trade(what, {m: blocks[m] for m in self._others()}, parts)
        if sum(map(len, heads)) == num_heads:
            return torch.cat(blocks, 2)
        whole = x.new_zeros(b, mine, num_heads, *tail)
        for block, some in zip(blocks, heads, strict=True):
            whole[:, :, some.start : some.stop] += block
        return whole

    def _others(self) -> list[int]:
        return [(self.me + n) % self.members for n in range(1, self.members)]

    def _trade(self, what: str, receive: dict[int, Tensor], send: dict[int, Tensor]) -> None:
        messages = lambda parts: [Message(self.first + m, (t,)) for m, t in parts.items() if t.numel()]
        self.ring.exchange("heads", what, messages(receive), messages(send)).wait()


def _lay(whole: Tensor, block: Tensor, runs: Ranges) -> None:
    """whole[:, places] = block."""
    if len(runs) > 16:
        whole.index_copy_(1, indices_of(runs, whole.device), block)
        return
    at = 0
    for run in runs:
        whole[:, run.start : run.stop : run.step] = block[:, at : at + len(run)]
        at += len(run)


def _pick_up(whole: Tensor, runs: Ranges, tokens: int) -> Tensor:
    """whole[:, places], contiguous."""
    if len(runs) > 16:
        return whole.index_select(1, indices_of(runs, whole.device))
    parts = [whole[:, run.start : run.stop : run.step] for run in runs]
    return torch.cat(parts, 1) if parts else whole.new_empty(whole.shape[0], tokens, *whole.shape[2:])
