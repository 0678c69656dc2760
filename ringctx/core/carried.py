"""What one rank computes when keys carry a number: tiles row by row, each giving to the keys that later rows meet.

Knows tiles and the attention; knows nothing of messages. `sums` (b n) is what visiting keys carry: the sum of what all earlier
queries gave them; a chunk's tiles, in ascending order of rows, add to it. Backward walks the same tiles in descending order, with
the sum of what later rows took.
Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703); the tile form and its backward are ours:
dF = -sum_h dA^h, dS_rj = sum of dF_ij over i > r, dL0 += slope(L0) dS.
Letters: b batch, s query tokens here, n visiting keys, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ringctx.core.carry import Carry, Chunk, spared
from ringctx.core.compute import HeadGroup, Work
from ringctx.core.layout import Ranges, indices_of
from ringctx.core.partial import Partial
from ringctx.core.pattern import FULL
from ringctx.core.sums import Sum
from ringctx.core.tiles import Line, Tile, pieces
from ringctx.kernels.base import TileScores
from ringctx.kernels.carried import Driving, after, backward, before, less

SIDE, SIDE_FUSED = 512, 2048
"""Most rows and keys of a tile: smaller ones pay dispatch, larger ones leave the cache (docs/results/selective); and of one that
one kernel computes, whose size on a GPU is a guess."""

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""dout, q, out, lse (0 where a row sees nothing), dlse or None, dmemory or None."""


class Meets(Protocol):
    """Queries and keys that meet, encoded: q (b s h d), k (b n g d), v (b n g e) or None where only head 0 counts; spared (b|1 n)."""

    @property
    def q(self) -> Tensor: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor | None: ...
    @property
    def spared(self) -> Tensor: ...

    def strictly_earlier(self, tile: Tile) -> Tensor | None:
        """Pairs of the tile whose key comes before the query: bool (b|1 q k), or None where all do."""

    def scores(self, work: Work, group: HeadGroup, tile: Tile, backward: bool) -> TileScores:
        """What happens to the logits of these heads in the tile."""


@dataclass(frozen=True)
class Meeting:
    """Queries of this rank and keys that visit, at indices that layouts give. Shapes as in `Meets`."""

    q: Tensor
    queries: Ranges
    k: Tensor
    v: Tensor | None
    keys: Ranges
    spared: Tensor

    @classmethod
    def of(cls, work: CarriedWork, q: Tensor, queries: Ranges, k: Tensor, v: Tensor | None, keys: Ranges) -> Meeting:
        return cls(q, queries, k, v, keys, spared(work.attention.pattern, indices_of(keys, q.device)))

    def strictly_earlier(self, tile: Tile) -> Tensor | None:
        """Pairs whose key comes before the query: bool (1 q k), or None where all do."""
        verdict, a, b, c, d = tile
        if verdict == FULL and Line(self.queries).hull(a, b)[0][0] > Line(self.keys).hull(c, d)[0][-1]:
            return None
        i, j = indices_of(self.queries, self.q.device)[a:b], indices_of(self.keys, self.q.device)[c:d]
        return (j < i[:, None])[None]

    def scores(self, work: Work, group: HeadGroup, tile: Tile, backward: bool) -> TileScores:
        """By the indices of both."""
        return work.scores(group, tile, self.q, self.queries, self.keys, backward)


def strips(tiles: Sequence[Tile], chunk: Chunk, side: int = SIDE) -> list[Tile]:
    """The tiles of a chunk's queries in pieces of at most `side` rows and keys, ascending by row."""
    cut = []
    for verdict, a, b, c, d in tiles:
        begin, end = max(a, chunk.begin), min(b, chunk.end)
        if begin < end:
            cut += pieces((verdict, begin, end, c, d), side)
    return sorted(cut, key=lambda tile: tile[1])


@dataclass
class CarriedWork(Work):
    """Work whose attention has a carry; all heads see alike. driving: head 0 alone."""

    driving: HeadGroup = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.driving = HeadGroup((0,), (0,), (0,), self.attention.pattern)

    @property
    def carry(self) -> Carry:
        carry = self.attention.carry
        assert isinstance(carry, Carry)
        return carry

    def fused(self, meeting: Meets) -> ModuleType | None:
        """The kernel that computes a whole tile at once, sums included, where there is one for such queries, and keys lie in order."""
        plain = self.kernel == "auto" and not (self.attention.elementwise or self.attention.additive or self.attention.dropout)
        if not (plain and self.carry.rectifies and isinstance(meeting, Meeting)):
            return None
        from ringctx.kernels import triton_carried

        return triton_carried if triton_carried.why_not(str(meeting.q.device), meeting.q.dtype) is None else None

    # -- the three ways over a chunk's tiles ------------------------------------------------------------------------

    def give(self, meeting: Meets, tiles: Sequence[Tile], sums: Tensor) -> None:
        """Add to sums (b n) what these tiles' queries give."""
        for tile in tiles:
            sums[:, tile[3] : tile[4]] += self._drive(meeting, tile)[0].given().sum(1)

    def attend(self, total: Partial, memory: Tensor | None, meeting: Meets, tiles: Sequence[Tile], sums: Tensor) -> None:
        """Merge attention into total, add to sums (b n) what was given, and to memory (b s) what of each key was not forgotten."""
        q, k, v = meeting.q, meeting.k, meeting.v
        assert v is not None
        fused = self.fused(meeting) if memory is None else None
        for tile in tiles:
            verdict, a, b, c, d = tile
            if fused is not None:
                out, lse, given = fused.forward(q[:, a:b], k[:, c:d], v[:, c:d], *self._fusing(meeting, tile, sums[:, c:d]))
                total.rows(a, b).merge_(out, lse)
                sums[:, c:d] += given
                continue
            driving, earlier, scores = self._drive(meeting, tile)
            given = driving.given()
            taken = sums[:, None, c:d] + before(given)
            kernel = self.choose(verdict, q, q.shape[2], k.shape[2], v.shape[3], False)
            out, lse = kernel.forward(q[:, a:b], k[:, c:d], v[:, c:d], replace(scores, bias=less(scores.bias, taken)))
            total.rows(a, b).merge_(out, lse)
            if memory is not None:
                kept = 1 - taken.clamp(max=self.carry.tau) / self.carry.tau
                memory[:, a:b] += (kept if earlier is None else kept.masked_fill(~earlier, 0.0)).sum(2)
            sums[:, c:d] += given.sum(1)

    def retreat(self, grads: tuple[Sum, Sum, Sum], rows: Rows, meeting: Meets, tiles: Sequence[Tile], sums: Tensor) -> Tensor:
        """Add to grads = dq (b s h d), dk, dv as if no later chunk took anything; returns what this chunk's rows took, (b n).

        sums (b n): what the keys carried when the chunk met them.
        """
        dout, q, out, lse, dlse, dmemory = rows
        starts, sums = [], sums.clone()
        for tile in tiles:
            starts.append(sums[:, None, tile[3] : tile[4]].clone())
            self.give(meeting, [tile], sums)
        later = torch.zeros_like(sums)
        v = meeting.v
        assert v is not None
        fused = self.fused(meeting) if dmemory is None else None
        for tile, start in zip(reversed(tiles), reversed(starts), strict=True):
            _, a, b, c, d = tile
            of_rows = (dout[:, a:b], q[:, a:b], meeting.k[:, c:d], v[:, c:d], out[:, a:b], lse[:, a:b])
            of_lse = None if dlse is None else dlse[:, a:b]
            if fused is not None:
                dq, dk, dv, took = fused.backward(*of_rows, of_lse, *self._fusing(meeting, tile, start[:, 0]), later[:, c:d])
                self._add(grads, (dq, dk, dv), tile)
                later[:, c:d] += took
                continue
            driving, earlier, scores = self._drive(meeting, tile, backward=True)
            taken = start + before(driving.given())
            dq, dk, dv, dtaken = backward(*of_rows, scores, taken, of_lse)
            if dmemory is not None:
                forgets = taken < self.carry.tau if earlier is None else (taken < self.carry.tau) & earlier
                dtaken -= forgets * (dmemory[:, a:b, None] / self.carry.tau)
            self._add(grads, (dq, dk, dv), tile)
            self._drive_back(grads[0], grads[1], driving, tile, later[:, None, c:d] + after(dtaken))
            later[:, c:d] += dtaken.sum(1)
        return later

    def correct(self, dq: Sum, dk: Sum, meeting: Meets, tiles: Sequence[Tile], later: Tensor) -> None:
        """Add to dq (b s 1 d) and dk (b n 1 d) of head 0 what later chunks took from the keys, later (b n)."""
        for tile in tiles:
            driving = self._drive(meeting, tile, backward=True)[0]
            self._drive_back(dq, dk, driving, tile, later[:, None, tile[3] : tile[4]])

    # -- one tile ---------------------------------------------------------------------------------------------------

    def _drive(self, meeting: Meets, tile: Tile, backward: bool = False) -> tuple[Driving, Tensor | None, TileScores]:
        """Head 0 in this tile, where keys are seen and earlier (b|1 q k) or None for everywhere, and the scores of all heads."""
        _, a, b, c, d = tile
        q, k = meeting.q[:, a:b], meeting.k[:, c:d]
        scores = meeting.scores(self, self.groups[0], tile, backward)
        if scores.mask is not None:
            seen = scores.mask()
            scores = replace(scores, mask=lambda: seen)
        earlier = meeting.strictly_earlier(tile)
        if scores.mask is not None:
            of_head = seen[(None,) * (4 - seen.dim())][:, 0]
            earlier = of_head if earlier is None else earlier & of_head
        where, first = earlier, meeting.spared[:, None, c:d]
        if bool(first.any()):
            where = ~first if earlier is None else earlier & ~first
        of_driving = meeting.scores(self, self.driving, tile, backward)
        return Driving(q, k, of_driving, self.carry, where), earlier, scores

    def _fusing(self, meeting: Meets, tile: Tile, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]:
        """What the fused kernel takes beside q, k and v: indices, sums (b k), who is spared (b|1 k), the scale and the mask."""
        _, a, b, c, d = tile
        assert isinstance(meeting, Meeting)
        scores = meeting.scores(self, self.groups[0], tile, False)
        i, j = indices_of(meeting.queries, meeting.q.device)[a:b], indices_of(meeting.keys, meeting.q.device)[c:d]
        return i, j, sums, meeting.spared[:, c:d], scores.scale, None if scores.mask is None else scores.mask()

    @staticmethod
    def _add(grads: tuple[Sum, Sum, Sum], parts: tuple[Tensor, Tensor, Tensor], tile: Tile) -> None:
        """Add a tile's dq, dk, dv."""
        _, a, b, c, d = tile
        for total, part, tokens in zip(grads, parts, ((a, b), (c, d), (c, d)), strict=True):
            total.add(part, tokens)

    def _drive_back(self, dq: Sum, dk: Sum, driving: Driving, tile: Tile, dgiven: Tensor) -> None:
        _, a, b, c, d = tile
        of_q, of_k = driving.grads(dgiven)
        dq.add(of_q, (a, b), (0,))
        dk.add(of_k, (c, d), (0,))
