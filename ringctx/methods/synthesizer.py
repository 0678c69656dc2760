"""Synthesizer: logits that are not products of queries and keys, but learned for pairs of indices, or from the query's token alone.

    Random               logits_ij = R[h, i, j]                              trained, or fixed as drawn
    FactorisedRandom     logits_ij = (R1 R2^T)[h, i, j], of few columns      trained
    Dense                logits_ij = (W2 relu(W1 x_i))[h, j]                 from the token at i
    FactorisedDense      logits_ij = (A x_i)[h, j // b] (B x_i)[h, j % b]    from the token at i, of a + b numbers, a b = N
    mixed                logits_ij = (1 - sigmoid(a)) q_i k_j + sigmoid(a) R[h, i, j], a number a that is learned and begins at 0

Source: Tay et al. 2020 (Synthesizer, arXiv 2005.00743), sections 3.1 to 3.3; the mixture as in mesh-tensorflow's `plus_alpha`.
Of the random ones values travel alone, since every rank has the tables. Dense is an ordinary dot product with relu(W1 x_i) for a query
and row j of W2 for a key, and travels so. Of FactorisedDense each token's a + b numbers go to all ranks, and values travel.
Tables end at N tokens, and so do these methods: longer sequences are refused.
Knows indices. Knows nothing of ranks. Letters: b batch, s tokens here, h heads, N the most tokens, r columns, c width, e values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.gathered import whole
from ringctx.core.layout import Layout
from ringctx.core.pattern import Causal, Pattern
from ringctx.core.ring import Ring
from ringctx.errors import LayoutError
from ringctx.methods.scores import PairBias, Params, require_heads
from ringctx.methods.sighted import sight_at


@dataclass(frozen=True, eq=False)
class FactorisedBias:
    """left[h, i] . right[h, j]: a table of pairs (h or 1, N, N) by its factors (h or 1, N, r). Additive. Equal only to itself."""

    left: Tensor
    right: Tensor

    def params(self) -> Params:
        """Both factors."""
        return (self.left, self.right)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """(h or 1, q, k)."""
        require_heads(self, len(self.left), heads)
        left, right = params
        at = self._rows(heads)
        return left[at, i] @ right[at, j].mT

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """From dbias (b h q k): a token that is there once gives its row once."""
        slope, at = dbias.sum(0), self._rows(heads)
        slope = slope if len(at) == len(slope) else slope.sum(0, keepdim=True)
        rows, columns = (x[at, where].to(slope.dtype) for x, where in zip(params, (i, j), strict=True))
        found = into or tuple(torch.zeros_like(x, dtype=slope.dtype) for x in params)
        found[0].index_put_((at, i), slope @ columns, accumulate=True)
        found[1].index_put_((at, j), slope.mT @ rows, accumulate=True)
        return found

    def _rows(self, heads: Tensor) -> Tensor:
        """The table's row of each head, (h 1); one row serves all, (1 1)."""
        return heads[:, None] if len(self.left) > 1 else heads.new_zeros(1, 1)

    def __str__(self) -> str:
        return f"factorised table {tuple(self.left.shape)}"


@dataclass(frozen=True, eq=False)
class OuterBias:
    """outer[h, i, j // b] inner[h, i, j % b]: tables (h N a) and (h N b) of each query's own. Additive. Equal only to itself."""

    outer: Tensor
    inner: Tensor

    def params(self) -> Params:
        """Both tables."""
        return (self.outer, self.inner)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """(h q k)."""
        require_heads(self, len(self.outer), heads)
        outer, inner = self._factors(heads, i, j, params)
        return outer * inner

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """From dbias (b h q k): each factor's slope is the other."""
        slope, at = dbias.sum(0), (heads[:, None, None], i[:, None])
        factors = self._factors(heads, i, j, tuple(x.to(slope.dtype) for x in params))
        found = into or tuple(torch.zeros_like(x, dtype=slope.dtype) for x in params)
        width = self.inner.shape[2]
        for into_, other, column in zip(found, factors[::-1], (j // width, j % width), strict=True):
            into_.index_put_((*at, column), slope * other, accumulate=True)
        return found

    def _factors(self, heads: Tensor, i: Tensor, j: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        at, width = (heads[:, None, None], i[:, None]), self.inner.shape[2]
        return params[0][(*at, j // width)], params[1][(*at, j % width)]

    def __str__(self) -> str:
        return f"outer tables {tuple(self.outer.shape)} and {tuple(self.inner.shape)}"


class Random(nn.Module):
    """A table (h N N); fixed stays as drawn."""

    def __init__(self, heads: int, length: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, length, length), requires_grad=not fixed)

    def score(self, weight: Tensor | float = 1.0) -> PairBias:
        """The table times a weight, as an additive score."""
        return PairBias(self.table * weight)

    @property
    def length(self) -> int:
        """N."""
        return self.table.shape[1]


class FactorisedRandom(nn.Module):
    """A table of two factors (h N r)."""

    def __init__(self, heads: int, length: int, columns: int = 8) -> None:
        super().__init__()
        scale = columns**-0.25  # so that the table's entries have variance 1
        self.left, self.right = (nn.Parameter(torch.randn(heads, length, columns) * scale) for _ in range(2))

    def score(self, weight: Tensor | float = 1.0) -> FactorisedBias:
        """The table times a weight, as an additive score."""
        return FactorisedBias(self.left * weight, self.right)

    @property
    def length(self) -> int:
        """N."""
        return self.left.shape[1]


Table = Random | FactorisedRandom


def synthesise(v: Tensor, table: Table, *, ring: Ring, layout: Layout, pattern: Pattern = Causal(), transport: str = "auto") -> Tensor:
    """v (b s h e) of this rank -> (b s h e): softmax of the table's logits; queries and keys have no width and do not travel.

    The table's gradients are this rank's share, to be summed over the ring. Raises LayoutError beyond N tokens.
    """
    _check(table.length, layout)
    nothing = v.new_zeros(*v.shape[:3], 0)
    attention = Attention(pattern=pattern, scores=(table.score(),), scale=1.0)
    found = ring_attention(nothing, nothing, v, ring=ring, layout=layout, attention=attention, transport=transport)
    assert isinstance(found, Tensor)
    return found


class Mixture(nn.Module):
    """A table beside dot products, weighed by sigmoid(alpha)."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table, self.alpha = table, nn.Parameter(torch.zeros(()))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        ring: Ring,
        layout: Layout,
        attention: Attention = Attention(),
    ) -> Tensor:
        """q (b s h d), k (b s g d), v (b s g e) of this rank -> (b s h e). attention: pattern, encoding, scale and further scores."""
        _check(self.table.length, layout)
        weight = self.alpha.sigmoid()
        asked = replace(attention, scores=(*attention.scores, self.table.score(weight)))
        found = ring_attention(q, k * (1 - weight), v, ring=ring, layout=layout, attention=asked)
        assert isinstance(found, Tensor)
        return found


class Dense(nn.Module):
    """W1 (c to h r) and W2 (h N r): what the token at i expects at each index."""

    def __init__(self, c: int, heads: int, length: int, width: int) -> None:
        super().__init__()
        self.inward = nn.Linear(c, heads * width)
        self.keys = nn.Parameter(torch.randn(heads, length, width) * width**-0.5)

    def forward(self, x: Tensor, v: Tensor, *, ring: Ring, layout: Layout, pattern: Pattern = Causal()) -> Tensor:
        """x (b s c) and v (b s h e) of this rank -> (b s h e)."""
        heads, length, width = self.keys.shape
        _check(length, layout)
        q = self.inward(x).relu().unflatten(-1, (heads, width))
        k = self.keys[:, layout.indices(ring.rank, x.device)].transpose(0, 1).expand(len(x), -1, -1, -1)
        found = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(pattern=pattern, scale=1.0))
        assert isinstance(found, Tensor)
        return found


class FactorisedDense(nn.Module):
    """A (c to h a) and B (c to h b): what the token at i expects at each index, as a product of two short rows. N = a b."""

    def __init__(self, c: int, heads: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.widths = heads, widths
        self.rows = nn.Linear(c, heads * sum(widths))

    def forward(self, x: Tensor, v: Tensor, *, ring: Ring, layout: Layout, pattern: Pattern = Causal()) -> Tensor:
        """x (b s c) and v (b s h e) of this rank -> (b s h e), a sequence at a time."""
        _check(self.widths[0] * self.widths[1], layout)
        sight_at(f"Synthesizer, factorised dense {self.widths}", v, v, v, ring=ring, layout=layout)
        rows, found = self.rows(x).unflatten(-1, (self.heads, -1)), list[Any]()
        for mine, values in zip(rows, v, strict=True):
            every, _ = whole(ring, mine, layout, "scores")
            outer, inner = every.transpose(0, 1).split(self.widths, -1)
            nothing = values.new_zeros(1, *values.shape[:2], 0)
            attention = Attention(pattern=pattern, scores=(OuterBias(outer, inner),), scale=1.0)
            found.append(ring_attention(nothing, nothing, values[None], ring=ring, layout=layout, attention=attention))
        return torch.cat(found)


def _check(length: int, layout: Layout) -> None:
    if layout.length > length:
        raise LayoutError(
            f"The sequence has {layout.length} tokens, and the table ends at {length}; make it for so many, or cut the sequence."
        )
