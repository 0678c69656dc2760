"""Reference kernel: attention by its definition, for every mask, bias, elementwise score, dropout and width.

fp64 is computed in fp64, everything else in fp32. Slow but bounded: it holds the logits of a few hundred query rows.
Letters: b batch, q and k the tile's queries and keys, c query rows of one chunk, h query heads, g key/value heads, d key width,
e value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from ringctx.kernels.base import Call, TileScores, accumulation_dtype
from ringctx.kernels.tricks import exp_, is_empty, no_gradient, nothing_seen, require_square, rows_of_lse

CHUNK_ROWS = 256
CHUNK_LOGITS = 1 << 24  # 64 MiB in fp32
FEW_PRODUCTS = 1 << 18


class Reference:
    """Takes every call in a floating dtype; see Kernel for the shapes."""

    name = "reference"

    def why_not(self, call: Call) -> str | None:
        if not call.dtype.is_floating_point or call.dtype.itemsize < 2:
            return "it computes float64, float32, bfloat16 and float16 only"
        return None

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        with torch.autocast(q.device.type, enabled=False):
            tile = _Tile(q, k, scores)
            values = v.to(tile.dtype).transpose(1, 2)  # (b g k e)
            out = q.new_empty(*q.shape[:3], v.shape[3], dtype=tile.dtype)
            lse = q.new_empty(q.shape[:3], dtype=tile.dtype)
            for rows in tile.chunks():
                logits, _ = tile.logits(rows)
                top = logits.amax(-1, keepdim=True)
                weights = exp_(logits - top.masked_fill(top == -math.inf, 0.0))
                total = weights.sum(-1, keepdim=True)
                lse[:, rows] = (top + total.log()).squeeze(-1).transpose(1, 2)
                kept = weights / total.masked_fill(total == 0.0, 1.0)
                if tile.keep is not None:
                    kept *= tile.keep[:, :, rows]
                out[:, rows] = tile.ungroup(tile.group(kept) @ values)
            return out, lse

    @torch.no_grad()
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return self._backward(_Tile(q, k, scores), dout, v, out, lse, dlse)

    def _backward(
        self, tile: _Tile, dout: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P = exp(A - lse), dP = keep (dout.v), dA = P (dP - dout.out + dlse): FlashAttention-2 (Dao 2023), section 3.1.2."""
        values = v.to(tile.dtype).transpose(1, 2)
        dout = dout.to(tile.dtype)
        out = out.to(tile.dtype)
        lse = rows_of_lse(lse.to(tile.dtype))
        dq, dk, dv = torch.empty_like(tile.q), torch.zeros_like(tile.k), torch.zeros_like(values)
        biased = tile.whole_gradient()
        for rows in tile.chunks():
            logits, slope = tile.logits(rows, with_slope=True)
            p = exp_(logits - _column(lse[:, rows]))
            grad_rows = tile.group(dout[:, rows].transpose(1, 2))
            keep = None if tile.keep is None else tile.keep[:, :, rows]
            dv += tile.group(p if keep is None else p * keep).mT @ grad_rows
            da = tile.centred(rows, dout, values, out, keep)
            if dlse is not None:
                da = da + _column(dlse[:, rows].to(tile.dtype))
            da = da * p
            if biased is not None:
                biased[:, :, rows] = da
            if slope is not None:
                da = da * slope
            da = tile.group(da)
            dq[:, rows] = tile.ungroup(da @ tile.k) * tile.scores.scale
            dk += da.mT @ tile.group(tile.q[:, rows].transpose(1, 2))
        if biased is not None and tile.scores.bias_grad is not None:
            tile.scores.bias_grad(biased)
        return dq, dk.transpose(1, 2) * tile.scores.scale, dv.transpose(1, 2)


@torch.no_grad()
def logits_by_rows(q: Tensor, k: Tensor, scores: TileScores) -> Iterator[tuple[slice, Tensor]]:
    """The final logits (b h c k) of some rows after others, -inf where masked, in the accumulation dtype; q (b q h d), k (b k g d)."""
    with torch.autocast(q.device.type, enabled=False):
        tile = _Tile(q, k, scores)
        yield from ((rows, tile.logits(rows)[0]) for rows in tile.chunks())


def column_sums(q: Tensor, k: Tensor, lse: Tensor, scores: TileScores) -> Tensor:
    """What these rows give each key: sum over rows of exp(A - lse), (b h k) in the accumulation dtype.

    q (b q h d), k (b k g d), lse (b q h) of the whole rows; a row that sees nothing, with lse -inf, gives nothing.
    """
    with torch.autocast(q.device.type, enabled=False):
        tile = _Tile(q, k, scores)
        total = tile.q.new_zeros(q.shape[0], q.shape[2], k.shape[1])
        whole = lse.to(tile.dtype).masked_fill(lse == -math.inf, 0.0)
        for rows in tile.chunks():
            logits, _ = tile.logits(rows)
            total += exp_(logits - _column(whole[:, rows])).sum(2)
        return total


class _Tile:
    """Queries and keys in the compute dtype, and the tile's mask, bias and keep, evaluated once."""

    def __init__(self, q: Tensor, k: Tensor, scores: TileScores) -> None:
        self.scores = scores
        self.dtype = accumulation_dtype(q.dtype)
        self.q = q.to(self.dtype)
        self.k = k.to(self.dtype).transpose(1, 2)  # (b g k d)
        self.shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])  # (b h q k)
        self.mask = None if scores.mask is None else scores.mask().expand(self.shape)
        self.bias = None if scores.bias is None else scores.bias().to(self.dtype).expand(self.shape)
        self.keep = None if scores.keep is None else scores.keep().to(self.dtype).expand(self.shape)

    def chunks(self) -> Iterator[slice]:
        b, h, num_rows, num_keys = self.shape
        step = max(1, min(CHUNK_ROWS, CHUNK_LOGITS // (b * h * num_keys)))
        return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))

    def logits(self, rows: slice, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """The final logits of these rows (b h c k), -inf where masked, and the derivative of the elementwise scores, if any."""
        logits = self.ungroup_heads(self.group(self.q[:, rows].transpose(1, 2)) @ self.k.mT).mul_(self.scores.scale)
        slopes = []
        for step in self.scores.elementwise:
            if with_slope:
                slopes.append(step.derivative(logits))
            logits = step.apply(logits)
        if self.bias is not None:
            logits = logits + self.bias[:, :, rows]
        if self.scores.causal:
            i = torch.arange(rows.start, rows.stop, device=logits.device)
            logits = logits.masked_fill(torch.arange(self.shape[3], device=logits.device) > i[:, None], -math.inf)
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask[:, :, rows], -math.inf)
        return logits, reduce(torch.mul, slopes) if slopes else None

    def centred(self, rows: slice, dout: Tensor, values: Tensor, out: Tensor, keep: Tensor | None) -> Tensor:
        """keep dout.v - dout.out of these rows (b h c k).

        In a small tile as dout.(keep v - out): exactly 0 where a row sees one key, so that no rounding stands in for its
        true gradient, which is 0.
        """
        b, h, _, num_keys = self.shape
        grad, own = dout[:, rows].transpose(1, 2), out[:, rows].transpose(1, 2)
        if grad.numel() * num_keys <= FEW_PRODUCTS:
            each = values.repeat_interleave(h // values.shape[1], 1).unsqueeze(2)  # (b h 1 k e)
            each = each if keep is None else each * keep.unsqueeze(-1)
            return ((each - own.unsqueeze(3)) * grad.unsqueeze(3)).sum(-1)
        dp = self.ungroup_heads(self.group(grad) @ values.mT)
        return (dp if keep is None else dp * keep) - (grad * own).sum(-1, keepdim=True)

    def whole_gradient(self) -> Tensor | None:
        """Room for the gradient of the biased logits (b h q k), if somebody asked for it."""
        return None if self.scores.bias_grad is None else self.q.new_empty(self.shape)

    def group(self, x: Tensor) -> Tensor:
        """(b h c x) -> (b g h/g*c x): the query heads that share a key head stand below each other, so no key is copied."""
        b, h, c, last = x.shape
        g = self.k.shape[1]
        return x.reshape(b, g, h // g * c, last)

    def ungroup_heads(self, x: Tensor) -> Tensor:
        """(b g h/g*c x) -> (b h c x)."""
        b, h = self.shape[:2]
        return x.reshape(b, h, x.shape[1] * x.shape[2] // h, x.shape[3])

    def ungroup(self, x: Tensor) -> Tensor:
        """(b g h/g*c x) -> (b c h x)."""
        return self.ungroup_heads(x).transpose(1, 2)


def _column(x: Tensor) -> Tensor:
    """(b c h) -> (b h c 1)."""
    return x.transpose(1, 2).unsqueeze(-1)
