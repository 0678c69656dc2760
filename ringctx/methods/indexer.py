"""DSA's lightning indexer: small heads of its own say which keys are worth attending to, token by token.

    I_ts = sum_j w_tj relu(qI_tj . kI_s)        out_t = attention over the `top` keys of the largest I_ts, s <= t

The indexer is trained apart from the model, on detached tokens: L = sum_t KL(p_t || softmax_s I_ts), p_t the sum of the model's attention
over heads, made to sum to 1; first over all keys (warm-up), then over the chosen ones.
Source: DeepSeek-V3.2-Exp report (DSA), equations 1 to 4. Its Hadamard rotation and fp8 are not here, and encodings are yours.
kI travels to every rank, one narrow head of it; then a bit a query and key, then the keys that were chosen.
Letters: b batch, s queries here, n keys here, N keys of all ranks, h query heads, g key heads, j indexer heads, d widths, c the model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringctx.core.attention import Attention, Encoding
from ringctx.core.gathered import whole
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.core.select import Sight
from ringctx.methods.selectors.summaries import KIND, at_least_one, chosen, largest
from ringctx.methods.sighted import Chosen, attend, places, sight_at

ROWS = 256
"""Queries of a tile of index scores."""
_PLAIN = Attention()


@dataclass(frozen=True)
class Indexed:
    """What an indexer says of this rank's tokens: q (b s j d), k (b s d), w (b s j), the scale in w."""

    q: Tensor
    k: Tensor
    w: Tensor

    def row(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, w of one sequence."""
        return self.q[n], self.k[n], self.w[n]


class LightningIndexer(nn.Module):
    """x (b s c) -> Indexed. heads: 64 in the report; width: 128 there; encoding: of its queries and key by index, or None."""

    def __init__(self, c: int, heads: int = 64, width: int = 128, encoding: Encoding | None = None) -> None:
        super().__init__()
        self.heads, self.width, self.encoding = heads, width, encoding
        self.queries, self.weights = nn.Linear(c, heads * width, bias=False), nn.Linear(c, heads, bias=False)
        self.keys, self.norm = nn.Linear(c, width, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor, indices: Tensor) -> Indexed:
        """x: the model's tokens, which get no gradient. indices (s): where they stand in the whole sequence."""
        x = x.detach()
        q, k = self.queries(x).unflatten(-1, (self.heads, self.width)), self.norm(self.keys(x))[:, :, None]
        if self.encoding is not None:
            q, k = self.encoding.queries(q, indices), self.encoding.keys(k, indices)
        return Indexed(q, k.squeeze(2), self.weights(x) * (self.heads * self.width) ** -0.5)


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """I (s N) of q (s j d), k (N d), w (s j)."""
    return torch.einsum("sj,sjn->sn", w, torch.einsum("sjd,nd->sjn", q, k).relu())


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Indexed,
    *,
    top: int,
    ring: Ring,
    layout: Layout | None,
    key_layout: Layout | None = None,
    attention: Attention = _PLAIN,
) -> Tensor:
    """q (b s h d), k (b n g d), v (b n g e) -> (b s h e): each query over its `top` keys, the same for all heads. All ranks together.

    index: its q and w of these queries, its k of these keys; no gradient reaches it. attention: causal; the choice narrows its pattern.
    layout: as in ring_attention; None while decoding, when every rank holds the newest tokens, the last of key_layout, without backward.
    """
    at_least_one("indexed_attention", top=top)
    method, found = f"attention to {top} indexed keys", list[Tensor]()
    sight = sight_at(method, q, k, v, ring=ring, layout=layout, key_layout=key_layout)
    for n in range(len(q)):
        select = Chosen(_choose(sight, top, *(x.detach() for x in index.row(n))))
        found.append(attend(sight, replace(attention, select=select), *(x[n : n + 1] for x in (q, k, v))))
    return torch.cat(found)


def indexer_loss(
    q: Tensor, k: Tensor, index: Indexed, *, ring: Ring, layout: Layout, top: int | None = None, scale: float | None = None
) -> Tensor:
    """This rank's share of sum_t KL(p_t || softmax I_t), to be summed over the ring. All ranks together, backward too.

    q (b s h d), k (b s g d): the model's, encoded; they get no gradient, and k travels to every rank. top: None for the warm-up over all
    keys before a query, or as many as are chosen. Tiles of rows are computed again in backward.
    """
    at = places(sight_at(f"an indexer's loss, top {top}", q, k, k, ring=ring, layout=layout), q)
    sums = []
    for n in range(len(q)):
        keys, j = whole(ring, k[n].detach(), layout, KIND)
        index_q, index_k, w = index.row(n)
        index_keys, _ = whole(ring, index_k, layout, KIND)
        for rows in _tiles(len(at)):
            seen_by = (q[n, rows].detach(), keys, j.to(q.device), at[rows], top, scale)
            sums.append(checkpoint(_divergence, index_q[rows], index_keys, w[rows], *seen_by, use_reentrant=False))
        if not len(at):
            sums.append(0.0 * (index_q.sum() + index_keys.sum() + w.sum()))  # so that a rank without queries takes part in backward
    return torch.stack(sums).sum()


def _choose(sight: Sight, top: int, q: Tensor, k: Tensor, w: Tensor) -> Pattern:
    """The `top` largest of each query, on every rank."""
    keys, j = whole(sight.ring, k, sight.key_layout, KIND)
    at = places(sight, q)
    mine = torch.zeros(len(at), 1, sight.length, dtype=torch.bool, device=q.device)
    for rows in _tiles(len(at)):
        scores = index_scores(q[rows].double(), keys.double(), w[rows].double())
        seen = j.to(q.device) <= at[rows, None]
        mine[rows, 0] = mine[rows, 0].index_copy(1, j.to(q.device), largest(scores.masked_fill(~seen, -torch.inf), top))
    return chosen(sight, mine, 1)


def _attention_of(q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """The mean over heads of the model's attention (s N)."""
    by_group = q.unflatten(1, (k.shape[1], -1))
    logits = torch.einsum("sgrd,ngd->grsn", by_group, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1))


def _divergence(
    index_q: Tensor, index_k: Tensor, w: Tensor, q: Tensor, k: Tensor, j: Tensor, at: Tensor, top: int | None, scale: float | None
) -> Tensor:
    """sum_t KL(attention_t || softmax I_t) of the queries at these indices, over the chosen keys with top."""
    seen = j <= at[:, None]
    target = _attention_of(q, k, seen, scale)
    scores = index_scores(index_q, index_k, w)
    if top is not None:
        seen = largest(scores.detach().masked_fill(~seen, -torch.inf), top)
        target = target * seen
        target = target / target.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(target, target) - target * log_q).sum()


def _tiles(rows: int) -> Iterator[slice]:
    yield from (slice(n, min(n + ROWS, rows)) for n in range(0, rows, ROWS))
