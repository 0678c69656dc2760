"""Attention of any tile in Triton: whole, causal or masked, with a bias and its gradient, and with dropout. The algorithm is
FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithms 1 and 2).

Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
In kernels capitals are tensors in memory and compile-time numbers; small letters are registers, (rows, cols) where two-dimensional.
No number is written by two programs of a launch, so the order in which programs run decides nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringctx.kernels.base import Call, TileScores
from ringctx.kernels.tricks import is_empty, no_gradient, nothing_seen, require_square
from ringctx.kernels.triton_blocks import jit, load, load_keys, load_rows, products, span, store, triton, why_not, wide

if triton:
    import triton.language as tl

WIDEST = 256


class Plane(NamedTuple):
    """A number for each pair, (1|b, 1|h, q, k) contiguous. b, h: places between two batch rows, two heads; 0 where they are the same."""

    X: Tensor
    b: int
    h: int


class Tile(NamedTuple):
    """What every kernel reads; tensors are contiguous."""

    Q: Tensor  # (b q h d)
    K: Tensor  # (b k g d)
    V: Tensor  # (b k g e)
    MASK: Plane | None  # bool
    BIAS: Plane | None  # fp32
    KEEP: Plane | None  # fp32
    scale: float
    num_queries: int
    num_keys: int
    CAUSAL: Any
    H: Any
    G: Any
    D: Any
    E: Any
    ROWS: Any  # powers of two, as all blocks are
    COLS: Any
    WIDE_D: Any
    WIDE_E: Any
    DOUT: Tensor | None = None  # (b q h e) in q's dtype
    LSE: Tensor | None = None  # (b q h) fp32
    DELTA: Tensor | None = None  # (b q h) fp32: rowsum(dout out) - dlse
    DBIAS: Tensor | None = None  # (b h q k) fp32


@jit
def _pairs(t, batch, head, rows, cols, B, H):
    """Where these pairs lie in a plane whose batch rows and heads are B and H places apart."""
    return batch * B + head * H + rows[:, None] * t.num_keys + cols[None, :]


@jit
def _logits(t, batch, head, rows, cols, q, k):
    """Scaled, biased and masked: -inf where the query does not see the key."""
    seen = (rows < t.num_queries)[:, None] & (cols < t.num_keys)[None, :]
    logits = products(q, k) * t.scale
    if t.BIAS is not None:
        logits += tl.load(t.BIAS.X + _pairs(t, batch, head, rows, cols, t.BIAS.b, t.BIAS.h), mask=seen, other=0.0)
    if t.CAUSAL:
        seen = seen & (cols[None, :] <= rows[:, None])
    if t.MASK is not None:
        seen = seen & (tl.load(t.MASK.X + _pairs(t, batch, head, rows, cols, t.MASK.b, t.MASK.h), mask=seen, other=0) != 0)
    return tl.where(seen, logits, float("-inf"))


@jit
def _kept(t, batch, head, rows, cols, x):
    """x times dropout's multipliers."""
    if t.KEEP is not None:
        exist = (rows < t.num_queries)[:, None] & (cols < t.num_keys)[None, :]
        x *= tl.load(t.KEEP.X + _pairs(t, batch, head, rows, cols, t.KEEP.b, t.KEEP.h), mask=exist, other=0.0)
    return x


@jit
def _attend(t: Tile, OUT, LSE):
    """One block of rows of one head walks the keys, softmax on the way."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = span(block, t.ROWS)
    q = load(t.Q, batch, rows, t.num_queries, head, t.H, t.D, t.WIDE_D)
    highest = tl.full((t.ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((t.ROWS,), tl.float32)
    out = tl.zeros((t.ROWS, t.WIDE_E), tl.float32)
    end = tl.minimum(t.num_keys, (block + 1) * t.ROWS) if t.CAUSAL else t.num_keys
    for c in range(tl.cdiv(end, t.COLS)):
        cols = span(c, t.COLS)
        k, v = load_keys(t, batch, cols, head // (t.H // t.G))
        logits = _logits(t, batch, head, rows, cols, q, k)
        higher = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet must not subtract -inf from -inf
        weights, shrink = tl.exp(logits - level[:, None]), tl.exp(highest - level)
        total = total * shrink + tl.sum(weights, 1)
        kept = _kept(t, batch, head, rows, cols, weights)
        out = out * shrink[:, None] + tl.dot(kept.to(v.dtype), v, input_precision="ieee")
        highest = higher
    total = tl.where(total == 0.0, 1.0, total)
    store(OUT, out / total[:, None], batch, rows, t.num_queries, head, t.H, t.E, t.WIDE_E)
    tl.store(LSE + (batch * t.num_queries + rows) * t.H + head, highest + tl.log(total), mask=rows < t.num_queries)


@jit
def _grads(t, batch, head, rows, cols, q, k, v, dout, lse, delta):
    """One head's probabilities as dropout leaves them, and the gradients of its logits, dA."""
    weights = tl.exp(_logits(t, batch, head, rows, cols, q, k) - lse[:, None])
    dweights = _kept(t, batch, head, rows, cols, products(dout, v))
    return _kept(t, batch, head, rows, cols, weights), weights * (dweights - delta[:, None])


@jit
def _queries_back(t: Tile, DQ):
    """One block of rows of one head walks the keys: dq, and the gradient of the bias where it is wanted."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = span(block, t.ROWS)
    q, dout, lse, delta = load_rows(t, batch, rows, head)
    dq = tl.zeros((t.ROWS, t.WIDE_D), tl.float32)
    end = tl.minimum(t.num_keys, (block + 1) * t.ROWS) if t.CAUSAL else t.num_keys
    for c in range(tl.cdiv(end, t.COLS)):
        cols = span(c, t.COLS)
        k, v = load_keys(t, batch, cols, head // (t.H // t.G))
        _, dlogits = _grads(t, batch, head, rows, cols, q, k, v, dout, lse, delta)
        if t.DBIAS is not None:
            exist = (rows < t.num_queries)[:, None] & (cols < t.num_keys)[None, :]
            plane = t.num_queries * t.num_keys
            tl.store(t.DBIAS + _pairs(t, batch, head, rows, cols, t.H * plane, plane), dlogits, mask=exist)
        dq += tl.dot(dlogits.to(k.dtype), k, input_precision="ieee")
    store(DQ, dq * t.scale, batch, rows, t.num_queries, head, t.H, t.D, t.WIDE_D)


@jit
def _keys_back(t: Tile, DK, DV):
    """One block of keys of one key head walks the rows, for each of the query heads that read it: dk and dv."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = span(block, t.COLS)
    k, v = load_keys(t, batch, cols, group)
    dk, dv = tl.zeros((t.COLS, t.WIDE_D), tl.float32), tl.zeros((t.COLS, t.WIDE_E), tl.float32)
    first = block * t.COLS // t.ROWS if t.CAUSAL else 0
    for n in range(t.H // t.G):
        head = group * (t.H // t.G) + n
        for a in range(first, tl.cdiv(t.num_queries, t.ROWS)):
            rows = span(a, t.ROWS)
            q, dout, lse, delta = load_rows(t, batch, rows, head)
            kept, dlogits = _grads(t, batch, head, rows, cols, q, k, v, dout, lse, delta)
            dv += tl.dot(tl.trans(kept.to(dout.dtype)), dout, input_precision="ieee")
            dk += tl.dot(tl.trans(dlogits.to(q.dtype)), q, input_precision="ieee")
    store(DK, dk * t.scale, batch, cols, t.num_keys, group, t.G, t.D, t.WIDE_D)
    store(DV, dv, batch, cols, t.num_keys, group, t.G, t.E, t.WIDE_E)


class Triton:
    """These kernels; see Kernel for the shapes. Gradients are fp32."""

    name = "triton"

    def why_not(self, call: Call) -> str | None:
        if call.elementwise:
            return "has no elementwise scores here"
        if max(call.d, call.e) > WIDEST:
            return f"is at most {WIDEST} wide"
        return why_not(call.device, call.dtype)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        tile = _prepare(q, k, v, scores, rows=_sides(q, v)[0])
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        blocks = -(-q.shape[1] // tile.ROWS.value)
        _attend[(blocks, q.shape[2], q.shape[0])](tile, out, lse, num_stages=2, num_warps=_warps(tile))
        return out, lse

    @torch.no_grad()
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        delta = (dout.float() * out.float()).sum(-1)
        delta = delta if dlse is None else delta - dlse
        (b, num_queries, h), (num_keys, g) = q.shape[:3], k.shape[1:3]
        dbias = None if scores.bias_grad is None else q.new_empty(b, h, num_queries, num_keys, dtype=torch.float32)
        if dbias is not None and scores.causal:
            dbias.zero_()  # blocks above the diagonal are not visited
        tile = _prepare(q, k, v, scores, rows=_sides(q, v)[1])._replace(
            DOUT=dout.to(q.dtype).contiguous(), LSE=lse.float().contiguous(), DELTA=delta.contiguous(), DBIAS=dbias
        )
        dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        rows, keys = (-(-n // side.value) for n, side in ((num_queries, tile.ROWS), (num_keys, tile.COLS)))
        _queries_back[(rows, h, b)](tile, dq, num_stages=2, num_warps=_warps(tile))
        _keys_back[(keys, g, b)](tile._replace(DBIAS=None), dk, dv, num_stages=2, num_warps=_warps(tile))
        if scores.bias_grad is not None and dbias is not None:
            scores.bias_grad(dbias)
        return dq, dk, dv


def _prepare(q: Tensor, k: Tensor, v: Tensor, scores: TileScores, rows: int) -> Tile:
    (num_queries, h, d), (num_keys, g, e) = q.shape[1:], v.shape[1:]
    pairs = num_queries, num_keys
    mask = None if scores.mask is None else _plane(scores.mask(), pairs)
    bias = None if scores.bias is None else _plane(scores.bias().float(), pairs)
    keep = None if scores.keep is None else _plane(scores.keep().float(), pairs)
    sides = rows, _sides(q, v)[2]
    sizes = (tl.constexpr(x) for x in (scores.causal, h, g, d, e, *sides, wide(d), wide(e)))
    return Tile(q.contiguous(), k.contiguous(), v.contiguous(), mask, bias, keep, scores.scale, num_queries, num_keys, *sizes)


def _plane(x: Tensor, pairs: tuple[int, int]) -> Plane:
    b, h = ((1, 1) + x.shape)[-4:-2]
    x = x.expand(b, h, *pairs).contiguous()
    return Plane(x, x.stride(0) if b > 1 else 0, x.stride(1) if h > 1 else 0)


def _sides(q: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Rows of a block forward, rows of one backward, keys of one: to width 256 they fit compute capability 8.0's shared memory, 163 KiB."""
    width = max(wide(q.shape[3]), wide(v.shape[3]))
    if q.element_size() == 2 and width <= 128:
        return 128, 64, 64
    return (32, 32, 32) if width * q.element_size() <= 512 else (16, 16, 16)


def _warps(tile: Tile) -> int:
    return max(2, tile.ROWS.value // 16)
