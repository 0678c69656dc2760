"""A tile whose keys carry what earlier queries gave them: that is subtracted from every head's logits.

Head 0 gives: query r adds S_rj = gives(L0_rj) to key j, and every later query i finds F_ij = sum of S_rj over r < i taken from its
logits. What rows of other tiles gave comes in as `sums`; inside a tile it is an exclusive running sum over its rows.
Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703), figure 2; here tile by tile.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from ringctx.kernels.base import TileScores, accumulation_dtype
from ringctx.kernels.reference import Reference

GROUP = 16  # rows that a running sum takes together: torch's own along rows is ten times slower


class Gives(Protocol):
    """What a logit of head 0 gives to its key."""

    def gives(self, logits: Tensor) -> Tensor:
        """S of logits of any shape, in their dtype; 0 for -inf."""

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of `gives` at these logits."""


def before(x: Tensor) -> Tensor:
    """The sum of all earlier rows: (b q k) -> (b q k), row 0 is 0."""
    b, rows, keys = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % GROUP)).view(b, -1, GROUP, keys)
    inside = torch.ones(GROUP, GROUP, dtype=x.dtype, device=x.device).tril_(-1) @ padded
    inside[:, 1:] += padded.sum(2).cumsum(1)[:, :-1, None]
    return inside.view(b, -1, keys)[:, :rows]


def after(x: Tensor) -> Tensor:
    """The sum of all later rows: (b q k) -> (b q k), the last row is 0."""
    return before(x.flip(1)).flip(1)


class Driving:
    """Head 0's logits in one tile, in the accumulation dtype, and what they give.

    q (b q h d), k (b k g d), encoded; scores: of head 0 in the tile; where: bool (b|1, q|1, k), the pairs in which a query gives at all
    (its key is seen, earlier and not spared), or None for all of them.
    """

    def __init__(self, q: Tensor, k: Tensor, scores: TileScores, rule: Gives, where: Tensor | None) -> None:
        dtype = accumulation_dtype(q.dtype)
        self.q, self.k, self.scores, self.rule, self.where = q[:, :, 0].to(dtype), k[:, :, 0].to(dtype), scores, rule, where
        logits = (self.q @ self.k.mT).mul_(scores.scale)
        slopes = []
        for score in scores.elementwise:
            slopes.append(score.derivative(logits))
            logits = score.apply(logits)
        if scores.bias is not None:
            logits = logits + scores.bias().to(dtype)[:, 0]
        self.logits, self.slope = logits, reduce(torch.mul, slopes) if slopes else None

    def given(self) -> Tensor:
        """S (b q k)."""
        return self._where(self.rule.gives(self.logits))

    def grads(self, dgiven: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of S (b q k or 1 k) those of head 0's query (b q 1 d) and key (b k 1 d)."""
        grad = self._where(self.rule.slope(self.logits) * dgiven)
        if self.scores.bias_grad is not None:
            self.scores.bias_grad(grad.unsqueeze(1))
        grad = grad if self.slope is None else grad * self.slope
        return (grad @ self.k).unsqueeze(2) * self.scores.scale, (grad.mT @ self.q).unsqueeze(2) * self.scores.scale

    def _where(self, x: Tensor) -> Tensor:
        return x if self.where is None else x.masked_fill_(~self.where, 0.0)


def less(bias: Callable[[], Tensor] | None, taken: Tensor) -> Callable[[], Tensor]:
    """A bias of all heads, less what was taken from them (b q k)."""
    taken = -taken.unsqueeze(1)
    return lambda: taken if bias is None else bias() + taken


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, taken: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv as a kernel's backward gives them, and the gradient of F = `taken` (b q k): less the sum over heads of dA.

    One key head at a time, so that a tile's matrices stay in the cache.
    """
    h, g = q.shape[2], k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    dtaken = torch.zeros_like(taken)
    dbias = None if scores.bias_grad is None else torch.zeros(q.shape[0], h, *taken.shape[1:], dtype=dtype, device=q.device)
    made = [None if make is None else make() for make in (scores.mask, less(scores.bias, taken), scores.keep)]
    parts = []
    for key_head in range(g):
        heads, own = slice(key_head * h // g, (key_head + 1) * h // g), slice(key_head, key_head + 1)

        def collect(grad: Tensor, heads: slice = heads) -> None:
            dtaken.sub_(grad.sum(1))
            if dbias is not None:
                dbias[:, heads] = grad

        mask, bias, keep = (_maker(x, heads) for x in made)
        mine = replace(scores, mask=mask, bias=bias, keep=keep, bias_grad=collect)
        dout_, q_, out_, lse_ = (x[:, :, heads] for x in (dout, q, out, lse))
        dlse_ = None if dlse is None else dlse[:, :, heads]
        parts.append(Reference().backward(dout_, q_, k[:, :, own], v[:, :, own], out_, lse_, mine, dlse_))
    if dbias is not None and scores.bias_grad is not None:
        scores.bias_grad(dbias)
    dq, dk, dv = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return dq, dk, dv, dtaken


def _maker(x: Tensor | None, heads: slice) -> Callable[[], Tensor] | None:
    """What makes these heads' part of a tensor that broadcasts to (b, h, q, k); None for None."""
    if x is None:
        return None
    part = x if x.dim() < 3 or x.shape[-3] == 1 else x[..., heads, :, :]
    return lambda: part
