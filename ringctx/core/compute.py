"""What one rank computes when keys visit: the tiles of a plan, through a kernel, into partials and gradients.

Knows tiles, kernels and the attention. Knows nothing of messages.
Letters: b batch, s query tokens here, n visiting keys, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ringctx import kernels
from ringctx.core import dropout
from ringctx.core.attention import Attention, scale_of
from ringctx.core.branch import LinearEncoding
from ringctx.core.layout import Ranges, indices_of, take
from ringctx.core.masks import MASKS
from ringctx.core.partial import Partial
from ringctx.core.pattern import CAUSAL, FULL, PARTIAL, Pattern
from ringctx.core.sums import Sum
from ringctx.core.tiles import Tile, pieces
from ringctx.core.together import Several, joined
from ringctx.kernels.base import Call, Kernel, TileScores, accumulation_dtype

FEW_PAIRS = 16 * 16
"""Backward of an fp32 or fp64 tile with so few query-key pairs is always the reference kernel's, which is exact where a row sees
one key: there the true dq and dk are 0, and no longer row is there to drown what a fused kernel leaves of them."""


SINK_ROWS = 4096


@dataclass(frozen=True)
class HeadGroup:
    """Query heads that share one pattern, and the key heads they read. With branches, one such group for each of them.

    heads: their numbers in the whole model. rows: their places in q's head dim. keys: places in k's head dim; row n reads
    key n // (rows / keys), so a key head is listed once where that is regular, and once for each query head where not.
    encoding: the branch's, of queries and keys that are here as they were given; None where they are encoded.
    """

    heads: tuple[int, ...]
    rows: tuple[int, ...]
    keys: tuple[int, ...]
    pattern: Pattern
    encoding: LinearEncoding | None = None


def head_groups(
    attention: Attention, num_heads: int, num_key_heads: int, heads: range | None = None, first_key: int = 0
) -> tuple[HeadGroup, ...]:
    """Groups for the query heads that are here (all, or `heads` of the whole model, with key heads from first_key on)."""
    here = heads if heads is not None else range(num_heads)
    groups = []
    for members, seen in attention.parts(num_heads):
        mine = tuple(m for m in members if m in here)
        if mine:
            keys = [m * num_key_heads // num_heads - first_key for m in mine]
            rows = tuple(m - here.start for m in mine)
            groups += [HeadGroup(mine, rows, _regular(keys), pattern, encoding) for pattern, encoding in seen]
    return tuple(groups)


def _regular(keys: list[int]) -> tuple[int, ...]:
    distinct = list(dict.fromkeys(keys))
    times = len(keys) // len(distinct)
    return tuple(distinct if keys == [k for k in distinct for _ in range(times)] else keys)


def pick(x: Tensor, heads: tuple[int, ...], dim: int = 2) -> Tensor:
    """These heads of x; a view where they are neighbours, else a copy."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x.narrow(dim, heads[0], len(heads))
    return x.index_select(dim, torch.tensor(heads, device=x.device))


class Encoded:
    """Queries (b s h d) and visiting keys (b n g d) as a branch encodes them, where its tiles touch them; or as they are.

    Keys travel as they were given, once, and each branch that sees them encodes them here; gradients go back the same way.
    """

    def __init__(self, group: HeadGroup, tiles: Sequence[Tile], q: Tensor, queries: Ranges, k: Tensor, keys: Ranges) -> None:
        self.encoding, self.q, self.k, self.first = group.encoding, q, k, (0, 0)
        if self.encoding is None:
            return
        a, c = self.first = min(t[1] for t in tiles), min(t[3] for t in tiles)
        b, d = max(t[2] for t in tiles), max(t[4] for t in tiles)
        self.i, self.j = indices_of(queries, q.device)[a:b], indices_of(keys, k.device)[c:d]
        self.q, self.k = self.encoding.queries(q[:, a:b], self.i), self.encoding.keys(k[:, c:d], self.j)

    def rows(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The tile's queries and keys."""
        queries, keys = self._places(tile)
        return self.q[:, queries], self.k[:, keys]

    def grads(self, tile: Tile, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradients of a tile's encoded queries and keys those of what was given; in the accumulation dtype."""
        if self.encoding is None:
            return dq, dk
        queries, keys = self._places(tile)
        dq, dk = (x.to(accumulation_dtype(x.dtype)) for x in (dq, dk))
        return self.encoding.queries_grad(dq, self.i[queries]), self.encoding.keys_grad(dk, self.j[keys])

    def _places(self, tile: Tile) -> tuple[slice, slice]:
        _, a, b, c, d = tile
        return slice(a - self.first[0], b - self.first[0]), slice(c - self.first[1], d - self.first[1])


@dataclass
class Work:
    """One call's attention on this rank, ready to take visits. param_grads is filled by backward.

    wholes: one group of each set of heads; the branches of these heads merge into one total.
    """

    attention: Attention
    groups: tuple[HeadGroup, ...]
    params: Sequence[Tensor]
    kernel: str
    seed: int
    batch_offset: int
    need_param_grads: bool = False
    param_grads: list[Tensor] = field(default_factory=list)
    wholes: tuple[HeadGroup, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.wholes = tuple({group.rows: group for group in self.groups}.values())
        if self.need_param_grads:
            self.param_grads = [torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for p in self.params]

    # -- forward ----------------------------------------------------------------------------------------------------

    def empty(self, q: Tensor, e: int) -> list[Partial]:
        """One partial for each set of heads, having seen no key."""
        b, s = q.shape[:2]
        return [Partial.empty((b, s, len(g.rows), e), accumulation_dtype(q.dtype), q.device) for g in self.wholes]

    def forward(
        self, totals: list[Partial], tiles: Sequence[tuple[Tile, ...]], q: Tensor, queries: Ranges, k: Tensor, v: Tensor, keys: Ranges
    ) -> None:
        """Attend to visiting keys and merge into the totals. q (b s h d), k (b n g d), v (b n g e)."""
        of_rows = dict(zip((group.rows for group in self.wholes), totals, strict=True))
        for group, rows in zip(self.groups, tiles, strict=True):
            if not rows:
                continue
            q_, k_, v_ = pick(q, group.rows), pick(k, group.keys), pick(v, group.keys)
            total, encoded = of_rows[group.rows], Encoded(group, rows, q_, queries, k_, keys)
            several, rest = self._together(group, rows, q_, queries, k_, v_, keys, backward=False)
            if several is not None:
                total.rows(*several.at.queries).merge_(*several.forward(encoded, v_))
            for tile in self._pieces(rest):
                _, a, b, c, d = tile
                call, scores = self._tile(group, tile, q_, k_, v_, queries, keys)
                out, lse = call.forward(*encoded.rows(tile), v_[:, c:d], scores)
                total.rows(a, b).merge_(out, lse)

    def whole(self, totals: list[Partial], q: Tensor, e: int) -> tuple[Tensor, Tensor]:
        """out (b s h e) in q's dtype and lse (b s h) from the totals of all heads, the sink included."""
        if self.attention.sink is not None:
            for total, group in zip(totals, self.wholes, strict=True):
                total.add_sink_(pick(self.params[0], group.heads, 0))
        if len(totals) == 1:
            return totals[0].out.to(q.dtype), totals[0].lse
        out = torch.zeros(*q.shape[:3], e, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=accumulation_dtype(q.dtype), device=q.device)
        for total, group in zip(totals, self.wholes, strict=True):
            rows = torch.tensor(group.rows, device=q.device)
            out.index_copy_(2, rows, total.out.to(q.dtype))
            lse.index_copy_(2, rows, total.lse)
        return out, lse

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward(
        self,
        grads: tuple[Sum, Sum, Sum],
        tiles: Sequence[tuple[Tile, ...]],
        rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
        queries: Ranges,
        k: Tensor,
        v: Tensor,
        keys: Ranges,
    ) -> None:
        """Add to grads = dq (b s h d), dk (b n g d), dv (b n g e).

        rows: dout and q, then out in q's dtype, lse (0 where a row sees nothing), and dlse or None; whole rows' values.
        """
        dq, dk, dv = grads
        for group, some in zip(self.groups, tiles, strict=True):
            if not some:
                continue
            dout, q, out, lse, dlse = (x if x is None else pick(x, group.rows) for x in rows)
            assert dout is not None and q is not None and out is not None and lse is not None
            k_, v_ = pick(k, group.keys), pick(v, group.keys)
            encoded = Encoded(group, some, q, queries, k_, keys)
            several, rest = self._together(group, some, q, queries, k_, v_, keys, backward=True)
            if several is not None:
                (a, b), (c, d) = several.at.queries, several.at.keys
                parts = several.backward(encoded, v_, dout, out, lse, dlse)
                of_q, of_k = encoded.grads((FULL, a, b, c, d), parts[0], parts[1])
                dq.add(of_q, (a, b), group.rows)
                dk.add(of_k, (c, d), group.keys)
                dv.add(parts[2], (c, d), group.keys)
            for tile in self._pieces(rest):
                _, a, b, c, d = tile
                kernel, scores = self._tile(group, tile, q, k_, v_, queries, keys, backward=True)
                more = None if dlse is None else dlse[:, a:b]
                tensors = (*encoded.rows(tile), v_[:, c:d], out[:, a:b], lse[:, a:b])
                parts = kernel.backward(dout[:, a:b], *tensors, scores, more)
                of_q, of_k = encoded.grads(tile, parts[0], parts[1])
                dq.add(of_q, (a, b), group.rows)
                dk.add(of_k, (c, d), group.keys)
                dv.add(parts[2], (c, d), group.keys)

    def sink_grad(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> None:
        """The sink takes exp(sink - lse) of each row's weight and gives no value: dsink = sum of p (dlse - dout.out).

        All rows pull on one number, this way and that, so it is summed in fp64, some rows at a time.
        """
        heads = torch.tensor([h for g in self.wholes for h in g.heads], device=out.device)
        rows = torch.tensor([r for g in self.wholes for r in g.rows], device=out.device)
        total = torch.zeros(len(heads), dtype=torch.float64, device=out.device)
        for a in range(0, out.shape[1], SINK_ROWS):
            dout_, out_, lse_ = (x[:, a : a + SINK_ROWS].double() for x in (dout, out, lse))
            slope = -(dout_ * out_).sum(-1)
            slope = slope if dlse is None else slope + dlse[:, a : a + SINK_ROWS]
            weight = torch.exp(self.params[0].double()[heads] - lse_[:, :, rows])
            total += (weight * slope[:, :, rows]).sum((0, 1))
        self.param_grads[0].index_add_(0, heads, total.to(self.param_grads[0].dtype))

    def _pieces(self, rows: Sequence[Tile]) -> Sequence[Tile]:
        """The tiles, cut small where each builds a tensor of its own size (a bias, a dropout mask)."""
        heavy = self.attention.additive or self.attention.dropout
        return [piece for tile in rows for piece in pieces(tile)] if heavy else rows

    def _together(
        self, group: HeadGroup, rows: Sequence[Tile], q: Tensor, queries: Ranges, k: Tensor, v: Tensor, keys: Ranges, backward: bool
    ) -> tuple[Several | None, Sequence[Tile]]:
        """Tiles that the kernel computes in one call, if it does, and those that remain."""
        if self.attention.additive or self.attention.elementwise or self.attention.dropout:
            return None, rows
        kernel = self.choose(FULL, q, q.shape[2], k.shape[2], v.shape[3], backward)
        edge = getattr(kernel, "edge", None)
        if edge is None or q.shape[1] < edge:
            return None, rows
        rectangle, rest = joined(group.pattern, queries, keys, tuple(rows), edge)
        return None if rectangle is None else Several(kernel, rectangle, TileScores(scale_of(self.attention, q.shape[3]))), rest

    # -- one tile ---------------------------------------------------------------------------------------------------

    def choose(self, verdict: int, q: Tensor, h: int, g: int, e: int, backward: bool, few: bool = False) -> Kernel:
        """The kernel for tiles of this verdict with h query and g key heads, and few pairs or not; raises Unsupported with every reason."""
        attention = self.attention
        call = Call(
            device=q.device.type,
            dtype=q.dtype,
            h=h,
            g=g,
            d=q.shape[3],
            e=e,
            causal=verdict == CAUSAL,
            mask=verdict == PARTIAL,
            elementwise=bool(attention.elementwise),
            bias=bool(attention.additive or attention.carry),
            bias_grad=backward and self.need_param_grads and bool(attention.additive),
            dropout=attention.dropout > 0,
            backward=backward,
        )
        return kernels.choose(call, "reference" if few else self.kernel)

    def check(self, tiles: Iterable[Sequence[tuple[Tile, ...]]], q: Tensor, e: int, backward: bool) -> None:
        """Raise Unsupported before anything moves, if some tile would find no kernel."""
        kinds = {(kind, n) for visit in tiles for n, rows in enumerate(visit) for t in rows for kind in (FULL, t[0])}
        for verdict, n in sorted(kinds):  # plain tiles first, asked on every rank: what no tile is taken for all refuse alike
            group = self.groups[n]
            for way in (False, True)[: 1 + (backward and not self.attention.carry)]:  # a carry has a backward of its own
                self.choose(verdict, q, len(group.rows), len(group.keys), e, way)

    def _tile(
        self, group: HeadGroup, tile: Tile, q: Tensor, k: Tensor, v: Tensor, queries: Ranges, keys: Ranges, backward: bool = False
    ) -> tuple[Kernel, TileScores]:
        verdict, a, b, c, d = tile
        scores = self.scores(group, tile, q, queries, keys, backward)
        few = backward and q.dtype.itemsize >= 4 and (b - a) * (d - c) <= FEW_PAIRS
        return self.choose(verdict, q, q.shape[2], k.shape[2], v.shape[3], backward, few), scores

    def scores(self, group: HeadGroup, tile: Tile, q: Tensor, queries: Ranges, keys: Ranges, backward: bool) -> TileScores:
        """What happens to the logits of this tile's heads; q (b s . d) of all of this rank's queries."""
        verdict, a, b, c, d = tile
        attention = self.attention
        grad = backward and self.need_param_grads and bool(attention.additive)
        where = lambda: (indices_of(queries, q.device)[a:b], indices_of(keys, q.device)[c:d])  # many tiles never ask
        heads = torch.tensor(group.heads, device=q.device)
        return TileScores(
            scale=scale_of(attention, q.shape[3]),
            causal=verdict == CAUSAL,
            mask=(lambda: MASKS.of(group.pattern, take(queries, [(a, b)]), take(keys, [(c, d)]), q.device)) if verdict == PARTIAL else None,
            elementwise=attention.elementwise,
            bias=(lambda: self._bias(heads, *where(), accumulation_dtype(q.dtype))) if attention.additive else None,
            bias_grad=(lambda dbias: self._bias_grad(dbias, heads, *where())) if grad else None,
            keep=(lambda: self._keep(q.shape[0], heads, *where())) if attention.dropout > 0 else None,
        )

    def _score_params(self) -> list[tuple[int, tuple[Tensor, ...]]]:
        at, found = int(self.attention.sink is not None), []
        for score in self.attention.additive:
            size = len(score.params())
            found.append((at, tuple(self.params[at : at + size])))
            at += size
        return found

    def _bias(self, heads: Tensor, i: Tensor, j: Tensor, dtype: torch.dtype) -> Tensor:
        scores = zip(self.attention.additive, self._score_params(), strict=True)
        parts = [score.bias(heads, i, j, params, dtype=dtype) for score, (_, params) in scores]
        return sum(parts[1:], parts[0]).unsqueeze(0)

    def _bias_grad(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor) -> None:
        for score, (at, params) in zip(self.attention.additive, self._score_params(), strict=True):
            if params:
                score.grads(dbias, heads, i, j, params, into=tuple(self.param_grads[at : at + len(params)]))

    def _keep(self, size: int, heads: Tensor, i: Tensor, j: Tensor) -> Tensor:
        batch = torch.arange(self.batch_offset, self.batch_offset + size, device=i.device)
        return dropout.keep(self.attention.dropout, self.seed, batch, heads, i, j)
