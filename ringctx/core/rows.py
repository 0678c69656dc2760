"""Rows: what the weights of single queries look like, over all ranks' keys and without their matrix.

One rank's keys at a time visit. Beside a row's largest logit and its sum of exponentials travel nothing but three more sums, which
merge as these do: with m the largest logit A so far, l = sum e^(A-m), u = sum e^(A-m) (A-m), w = sum e^(2(A-m)),
    entropy = ln l - u/l        sum p^2 = w/l^2
and a larger m' takes l to e^(m-m') l, u to e^(m-m') (u + (m-m') l), w to e^(2(m-m')) w. The recurrence is ours.
Knows who sends what to whom. Letters: b batch, s rows here, n keys here, h query heads, g key heads, d key width, t bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ringctx.core.attention import Attention, scale_of
from ringctx.core.explicit import hull, refuse
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.pattern import EMPTY, FULL
from ringctx.core.ring import Ring
from ringctx.core.visiting import visitors
from ringctx.errors import RingctxError
from ringctx.kernels.base import TileScores, accumulation_dtype
from ringctx.kernels.reference import logits_by_rows

ROWS, KEYS = 128, 2048
"""Most rows and keys of a tile."""


@dataclass(frozen=True)
class Rows:
    """Each (b s h): lse of whole rows, the sink included; seen, the keys that a row may see; weight, the sum of its weights; their entropy
    -sum p ln p in nats; square, the sum of their squares; largest, the greatest. distance (b s h t): the weight in each bin of distances;
    first (b s h): on first keys.

    A row that sees nothing has all of these 0 and lse -inf. weight is 1 but for what a sink takes.
    """

    lse: Tensor
    seen: Tensor
    weight: Tensor
    entropy: Tensor
    square: Tensor
    largest: Tensor
    distance: Tensor
    first: Tensor

    @property
    def effective_count(self) -> Tensor:
        """(sum p)^2 / sum p^2: over how many keys a row spreads what it gives to keys; 0 where it sees none."""
        return self.weight.square() / self.square.clamp(min=torch.finfo(self.square.dtype).tiny)

    @property
    def hoyer(self) -> Tensor:
        """Hoyer's measure of the keys that a row sees, 0 for equal weights to 1 for one alone; 1 where it sees one key."""
        root = self.seen.to(self.square.dtype).sqrt()
        return torch.where(self.seen > 1, (root - self.effective_count.sqrt()) / (root - 1).clamp(min=1e-9), 1.0)


def measure_rows(
    q: Tensor, k: Tensor, *, i: Tensor, layout: Layout, ring: Ring, attention: Attention, edges: tuple[int, ...] = (), first: int = 0
) -> Rows:
    """Measure the weights of these rows over the keys of all ranks. All ranks must call it together, each with rows of its own.

    q (b s h d), not encoded, of indices i (s), any of the sequence; k (b n g d), not encoded, whose indices `layout` gives this rank.
    edges: ascending distances i - j at which bins begin, below the first of which a bin of its own lies. first: of the sequence's keys.
    No backward. Raises Unsupported for branches, selectors and dropout, RanksDisagree, RankLost.
    """
    agree(ring, _facts(q, k, layout, attention, edges, first), _problem(attention))
    with torch.no_grad(), ring.unbroken("measuring rows"):
        mine = layout.indices(ring.rank, k.device)
        if attention.encoding is not None:
            q, k = attention.encoding.queries(q, i), attention.encoding.keys(k, mine)
        sums = _Sums(q, attention, i, torch.tensor(edges, device=q.device), first)
        for keys, j in visitors(ring, "rows", (k, mine), (1, 0)):
            sums.add(keys, j)
        return sums.rows(attention.sink)


def _facts(q: Tensor, k: Tensor, layout: Layout, attention: Attention, edges: tuple[int, ...], first: int) -> dict[str, object]:
    return {
        "call": "measures of rows", "batch": q.shape[0], "heads": q.shape[2], "key heads": k.shape[2], "width": q.shape[3],
        "dtype": str(q.dtype), "layout": str(layout), "attention": attention.text()[:400], "edges": edges, "first": first,
    }  # fmt: skip


def _problem(attention: Attention) -> RingctxError | None:
    try:
        refuse(attention)
    except RingctxError as error:
        return error
    return None


class _Sums:
    """The sums of these rows over the keys that were there so far; (b h s) inside, for tiles come so."""

    def __init__(self, q: Tensor, attention: Attention, i: Tensor, edges: Tensor, first: int) -> None:
        self.q, self.attention, self.i, self.edges, self.first = q, attention, i, edges, first
        b, s, h, _ = q.shape
        zeros = q.new_zeros(b, h, s, dtype=accumulation_dtype(q.dtype))
        self.top = torch.full_like(zeros, -torch.inf)
        self.total, self.tilt, self.square, self.on_first = (zeros.clone() for _ in range(4))
        self.seen = torch.zeros_like(zeros, dtype=torch.int64)
        self.distance = zeros.new_zeros(b, h, s, len(edges) + 1)

    def add(self, k: Tensor, j: Tensor) -> None:
        """Let encoded keys (b n g d) of indices j (n) be seen."""
        pattern = self.attention.pattern
        for a in range(0, len(self.i), ROWS):
            for c in range(0, len(j), KEYS):
                i_, j_ = self.i[a : a + ROWS], j[c : c + KEYS]
                verdict = pattern.judge(hull(i_), hull(j_))
                if verdict != EMPTY:
                    scores = self._scores(i_, j_, plain=verdict == FULL)
                    for rows, logits in logits_by_rows(self.q[:, a : a + ROWS], k[:, c : c + KEYS], scores):
                        self._merge(slice(a + rows.start, a + rows.stop), logits, j_)

    def _scores(self, i: Tensor, j: Tensor, *, plain: bool) -> TileScores:
        attention, heads = self.attention, torch.arange(self.q.shape[2], device=i.device)
        allowed: Any = None if plain else attention.pattern.allows(i, j)
        mask = None if plain else (lambda: allowed[(None,) * (4 - allowed.dim())])
        biases = lambda: [score.bias(heads, i, j, score.params()) for score in attention.additive]
        bias = (lambda: reduce(torch.add, biases())[None]) if attention.additive else None
        return TileScores(scale=scale_of(attention, self.q.shape[3]), mask=mask, elementwise=attention.elementwise, bias=bias)

    def _merge(self, rows: slice, logits: Tensor, j: Tensor) -> None:
        """logits (b h c n) of these rows."""
        before = self.top[:, :, rows]
        top = torch.maximum(before, logits.amax(-1))
        safe = top.masked_fill(top.isneginf(), 0.0)
        fall = (before - safe).masked_fill(before.isneginf(), 0.0)
        shrink = fall.exp().masked_fill(before.isneginf(), 0.0)
        below = logits - safe[..., None]
        weights = below.exp()
        tilt = (weights * below.masked_fill(logits.isneginf(), 0.0)).sum(-1)
        self.tilt[:, :, rows] = shrink * (self.tilt[:, :, rows] + fall * self.total[:, :, rows]) + tilt
        self.total[:, :, rows] = shrink * self.total[:, :, rows] + weights.sum(-1)
        self.square[:, :, rows] = shrink.square() * self.square[:, :, rows] + weights.square().sum(-1)
        self.seen[:, :, rows] += (~logits.isneginf()).sum(-1)
        self.on_first[:, :, rows] = shrink * self.on_first[:, :, rows] + weights[..., j < self.first].sum(-1)
        bins = torch.bucketize(self.i[rows][:, None] - j, self.edges, right=True).expand(weights.shape)
        self.distance[:, :, rows] = (shrink[..., None] * self.distance[:, :, rows]).scatter_add(-1, bins, weights)
        self.top[:, :, rows] = top

    def rows(self, sink: Tensor | None) -> Rows:
        """The measures, once all keys were there."""
        some, top = self.total > 0, self.top.masked_fill(self.top.isneginf(), 0.0)
        lse = top + self.total.clamp(min=torch.finfo(top.dtype).tiny).log()
        lse = lse if sink is None else torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
        log = lse - top
        over = torch.where(some, (-log).exp(), 0.0)
        found = {
            "lse": torch.where(some, lse, -torch.inf), "seen": self.seen, "weight": self.total * over, "largest": over,
            "square": self.square * over.square(), "entropy": (self.total * log - self.tilt) * over, "first": self.on_first * over,
        }  # fmt: skip
        turned = {name: x.transpose(1, 2) for name, x in found.items()}
        return Rows(distance=(self.distance * over[..., None]).transpose(1, 2), **turned)
