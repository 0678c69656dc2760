"""Selective Attention of one tile in Triton: what a query gives a key weakens that key for the queries after it.

Never run on a GPU. What tests/unit/test_triton_carried.py proves, it proves on CPUs: in Triton's interpreter out, lse, sums and all
gradients equal a float64 oracle in float32 and float16 (bfloat16 comes out wrong there, so it is refused there), and Triton compiles
every launch in float32, float16 and bfloat16 for compute capability 8.0 and 9.0, into the shared memory that these have.
Speed, races and what a GPU's own arithmetic gives were not seen.

A tile is a run of query rows against a run of keys. Logits L = scale q.k; query head n reads key head n // (h // g). A pair is seen
if j <= i and the mask allows it. S_rj = relu(L_rj) of head 0 where head 0 sees the pair, j < i_r and key j is not spared; else 0.
Penalty F_rj = sums_j + the sum of S_r'j over the tile's rows r' before r; out = softmax(L - F) v, the same F for every head.

Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
In kernels capitals are tensors in memory and compile-time numbers; small letters are registers, (rows, cols) where two-dimensional.
No number is added to by two programs of a launch, so the order in which programs run decides nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringctx.errors import Unsupported
from ringctx.kernels.tricks import is_empty, nothing_seen
from ringctx.kernels.triton_blocks import jit, load, load_keys, load_rows, places, products, span, triton, why_not, wide

if triton:
    import triton.language as tl


class Tile(NamedTuple):
    """What every kernel reads; tensors are contiguous."""

    Q: Tensor  # (b q h d)
    K: Tensor  # (b k g d)
    V: Tensor  # (b k g e)
    I: Tensor  # (q,) int64
    J: Tensor  # (k,) int64
    SPARED: Tensor  # (b, k) bool
    MASK: Tensor | None  # (1|b, 1|h, q, k) bool
    mask_b: int  # heads of the mask between two of its batch rows, 0 if it has one
    mask_h: int  # 1 if heads differ in the mask, else 0
    TABLE: Tensor  # (b, blocks of rows, k) fp32: sums before each block's first row
    scale: float
    num_queries: int
    num_keys: int
    H: Any
    G: Any
    D: Any
    E: Any
    ROWS: Any
    COLS: Any
    WIDE_D: Any  # powers of two, as all blocks are
    WIDE_E: Any
    DOUT: Tensor | None = None  # (b q h e) in q's dtype
    LSE: Tensor | None = None  # (b q h) fp32
    DELTA: Tensor | None = None  # (b q h) fp32: rowsum(dout out) - dlse


@jit
def _add(X, x, batch, at, count, head, HEADS, WIDTH, WIDE: tl.constexpr):
    """Add x (at, WIDE) to these tokens of one head of X, which no other program touches meanwhile."""
    where, exist = places(X, batch, at, count, head, HEADS, WIDTH, WIDE)
    tl.store(where, tl.load(where, mask=exist, other=0.0) + x, mask=exist)


@jit
def _seen(t, batch, head, rows, cols):
    """Which pairs this query head sees."""
    i = tl.load(t.I + rows, mask=rows < t.num_queries, other=0)
    j = tl.load(t.J + cols, mask=cols < t.num_keys, other=0)
    seen = (j[None, :] <= i[:, None]) & (rows < t.num_queries)[:, None] & (cols < t.num_keys)[None, :]
    if t.MASK is not None:
        places = ((batch * t.mask_b + head * t.mask_h) * t.num_queries + rows)[:, None] * t.num_keys + cols[None, :]
        seen = seen & (tl.load(t.MASK + places, mask=seen, other=0) != 0)
    return seen


@jit
def _given(t, batch, rows, cols):
    """S: what head 0 of each row gives each key."""
    i = tl.load(t.I + rows, mask=rows < t.num_queries, other=0)
    j = tl.load(t.J + cols, mask=cols < t.num_keys, other=0)
    spared = tl.load(t.SPARED + batch * t.num_keys + cols, mask=cols < t.num_keys, other=1) != 0
    gives = _seen(t, batch, 0, rows, cols) & (j[None, :] < i[:, None]) & (spared == 0)[None, :]
    q = load(t.Q, batch, rows, t.num_queries, 0, t.H, t.D, t.WIDE_D)
    k = load(t.K, batch, cols, t.num_keys, 0, t.G, t.D, t.WIDE_D)
    return tl.where(gives, tl.maximum(products(q, k) * t.scale, 0.0), 0.0)


@jit
def _penalty(t, given, batch, block, cols):
    """F of this block of rows, from what its rows give and the table's line."""
    line = t.TABLE + (batch * tl.cdiv(t.num_queries, t.ROWS) + block) * t.num_keys
    return tl.load(line + cols, mask=cols < t.num_keys, other=0.0)[None, :] + (tl.cumsum(given, 0) - given)


@jit
def _scan(t: Tile, SUMS, FIRST, ADDED):
    """One block of keys walks the blocks of rows upwards and writes its part of the table, and what all rows gave."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = span(block, t.COLS)
    line = batch * t.num_keys + cols
    sums = tl.load(SUMS + line, mask=cols < t.num_keys, other=0.0)
    added = tl.zeros((t.COLS,), tl.float32)
    blocks = tl.cdiv(t.num_queries, t.ROWS)
    for a in range(tl.load(FIRST + block), blocks):
        tl.store(t.TABLE + (batch * blocks + a) * t.num_keys + cols, sums + added, mask=cols < t.num_keys)
        added += tl.sum(_given(t, batch, span(a, t.ROWS), cols), 0)
    tl.store(ADDED + line, added, mask=cols < t.num_keys)


@jit
def _attend(t: Tile, REACH, OUT, LSE):
    """One block of rows of one head walks the keys that it reaches: softmax on the way, head 0's part computed anew."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = span(block, t.ROWS)
    q = load(t.Q, batch, rows, t.num_queries, head, t.H, t.D, t.WIDE_D)
    highest = tl.full((t.ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((t.ROWS,), tl.float32)
    out = tl.zeros((t.ROWS, t.WIDE_E), tl.float32)
    for c in range(tl.cdiv(tl.load(REACH + block), t.COLS)):
        cols = span(c, t.COLS)
        penalty = _penalty(t, _given(t, batch, rows, cols), batch, block, cols)
        k, v = load_keys(t, batch, cols, head // (t.H // t.G))
        logits = tl.where(_seen(t, batch, head, rows, cols), products(q, k) * t.scale - penalty, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that saw nothing yet must not subtract -inf from -inf
        weights, shrink = tl.exp(logits - level[:, None]), tl.exp(highest - level)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    where, exist = places(OUT, batch, rows, t.num_queries, head, t.H, t.E, t.WIDE_E)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(where, out / total[:, None], mask=exist)
    tl.store(LSE + (batch * t.num_queries + rows) * t.H + head, highest + tl.log(total), mask=rows < t.num_queries)


@jit
def _grads(t, q, k, v, dout, lse, delta, seen, penalty):
    """One head's probabilities and the gradients of its logits, dA."""
    weights = tl.exp(tl.where(seen, products(q, k) * t.scale - penalty - lse[:, None], float("-inf")))
    return weights, weights * (products(dout, v) - delta[:, None])


@jit
def _penalty_grads(t, batch, rows, cols, penalty):
    """dF: minus dA of all heads."""
    total = tl.zeros((t.ROWS, t.COLS), tl.float32)
    for head in range(t.H):
        q, dout, lse, delta = load_rows(t, batch, rows, head)
        k, v = load_keys(t, batch, cols, head // (t.H // t.G))
        _, dlogits = _grads(t, q, k, v, dout, lse, delta, _seen(t, batch, head, rows, cols), penalty)
        total -= dlogits
    return total


@jit
def _given_grads(dpenalty, given, after):
    """The gradient of head 0's logits by way of S, of dF in these rows and its sums over the rows after them."""
    return tl.where(given > 0.0, after[None, :] + (tl.cumsum(dpenalty, 0, reverse=True) - dpenalty), 0.0)


@jit
def _scan_back(t: Tile, LATER, FIRST, AFTER, GIVEN, DK):
    """One block of keys walks the blocks of rows downwards: AFTER, a table as TABLE, gets dF's sums, dk of head 0 its part through S."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = span(block, t.COLS)
    line = batch * t.num_keys + cols
    later = tl.load(LATER + line, mask=cols < t.num_keys, other=0.0)
    total = tl.zeros((t.COLS,), tl.float32)
    dk = tl.zeros((t.COLS, t.WIDE_D), tl.float32)
    blocks = tl.cdiv(t.num_queries, t.ROWS)
    for step in range(blocks - tl.load(FIRST + block)):
        a = blocks - 1 - step
        rows = span(a, t.ROWS)
        given = _given(t, batch, rows, cols)
        dpenalty = _penalty_grads(t, batch, rows, cols, _penalty(t, given, batch, a, cols))
        tl.store(AFTER + (batch * blocks + a) * t.num_keys + cols, later + total, mask=cols < t.num_keys)
        dgiven = _given_grads(dpenalty, given, later + total)
        q = load(t.Q, batch, rows, t.num_queries, 0, t.H, t.D, t.WIDE_D)
        dk += tl.dot(tl.trans(dgiven.to(q.dtype)), q, input_precision="ieee")
        total += tl.sum(dpenalty, 0)
    tl.store(GIVEN + line, total, mask=cols < t.num_keys)
    _add(DK, dk * t.scale, batch, cols, t.num_keys, 0, t.G, t.D, t.WIDE_D)


@jit
def _first_back(t: Tile, AFTER, REACH, DQ):
    """One block of rows: dq of head 0 gets what comes to it by way of S. Needs what `_scan_back` wrote."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = span(block, t.ROWS)
    line = AFTER + (batch * tl.cdiv(t.num_queries, t.ROWS) + block) * t.num_keys
    dq = tl.zeros((t.ROWS, t.WIDE_D), tl.float32)
    for c in range(tl.cdiv(tl.load(REACH + block), t.COLS)):
        cols = span(c, t.COLS)
        given = _given(t, batch, rows, cols)
        dpenalty = _penalty_grads(t, batch, rows, cols, _penalty(t, given, batch, block, cols))
        dgiven = _given_grads(dpenalty, given, tl.load(line + cols, mask=cols < t.num_keys, other=0.0))
        k = load(t.K, batch, cols, t.num_keys, 0, t.G, t.D, t.WIDE_D)
        dq += tl.dot(dgiven.to(k.dtype), k, input_precision="ieee")
    _add(DQ, dq * t.scale, batch, rows, t.num_queries, 0, t.H, t.D, t.WIDE_D)


@jit
def _queries_back(t: Tile, REACH, DQ):
    """One block of rows of one head walks the keys that it reaches: dq by way of its own logits."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = span(block, t.ROWS)
    q, dout, lse, delta = load_rows(t, batch, rows, head)
    dq = tl.zeros((t.ROWS, t.WIDE_D), tl.float32)
    for c in range(tl.cdiv(tl.load(REACH + block), t.COLS)):
        cols = span(c, t.COLS)
        penalty = _penalty(t, _given(t, batch, rows, cols), batch, block, cols)
        k, v = load_keys(t, batch, cols, head // (t.H // t.G))
        _, dlogits = _grads(t, q, k, v, dout, lse, delta, _seen(t, batch, head, rows, cols), penalty)
        dq += tl.dot(dlogits.to(k.dtype), k, input_precision="ieee")
    _add(DQ, dq * t.scale, batch, rows, t.num_queries, head, t.H, t.D, t.WIDE_D)


@jit
def _keys_back(t: Tile, FIRST, DK, DV):
    """One block of keys of one key head walks the blocks of rows and the query heads that read it: dk and dv."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = span(block, t.COLS)
    k, v = load_keys(t, batch, cols, group)
    dk, dv = tl.zeros((t.COLS, t.WIDE_D), tl.float32), tl.zeros((t.COLS, t.WIDE_E), tl.float32)
    for a in range(tl.load(FIRST + block), tl.cdiv(t.num_queries, t.ROWS)):
        rows = span(a, t.ROWS)
        penalty = _penalty(t, _given(t, batch, rows, cols), batch, a, cols)
        for n in range(t.H // t.G):
            head = group * (t.H // t.G) + n
            q, dout, lse, delta = load_rows(t, batch, rows, head)
            weights, dlogits = _grads(t, q, k, v, dout, lse, delta, _seen(t, batch, head, rows, cols), penalty)
            dv += tl.dot(tl.trans(weights.to(dout.dtype)), dout, input_precision="ieee")
            dk += tl.dot(tl.trans(dlogits.to(q.dtype)), q, input_precision="ieee")
    _add(DK, dk * t.scale, batch, cols, t.num_keys, group, t.G, t.D, t.WIDE_D)
    _add(DV, dv, batch, cols, t.num_keys, group, t.G, t.E, t.WIDE_E)


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, sums: Tensor, spared: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a tile, and what its queries give its keys.

    q (b q h d), k (b k g d), v (b k g e); i (q,) and j (k,) int64, ascending: indices of queries and keys; sums (b k) fp32: what rows
    before this tile gave each key; spared (b|1, k) bool: keys that are given nothing; mask (1|b, 1|h, q, k) bool, True where seen.
    -> out (b q h e) in q's dtype, lse (b q h) fp32, natural logarithm, of this tile's keys alone (a row that sees none: out 0 and
    lse -inf), added (b k) fp32: what this tile's rows gave each key. Raises Unsupported with the reason of `why_not`.
    """
    _require(q)
    if is_empty(q, k, v):
        return *nothing_seen(q, v), torch.zeros_like(sums)
    tile, reach, _, added = _prepare(q, k, v, i, j, sums, spared, scale, mask)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _attend[(len(reach), q.shape[2], q.shape[0])](tile, reach, out, lse, num_stages=2, num_warps=tile.ROWS.value // 8)
    return out, lse, added


@torch.no_grad()
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    i: Tensor,
    j: Tensor,
    sums: Tensor,
    spared: Tensor,
    scale: float,
    mask: Tensor | None,
    later: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a tile, and what its rows say of the sums before them.

    Tensors as in `forward`, but out (b q h e) and lse (b q h) are the whole row's, over all tiles, and lse is 0 where a row sees
    nothing anywhere; dout as out; dlse (b q h) or None; later (b k) fp32: the sums of dF over the rows after this tile.
    -> dq, dk, dv in fp32 with the shapes of q, k, v, given (b k) fp32: the sums of dF over this tile's rows.
    """
    _require(q)
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    given = torch.zeros_like(later, memory_format=torch.contiguous_format)
    if is_empty(q, k, v):
        return dq, dk, dv, given
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    tile, reach, first, _ = _prepare(q, k, v, i, j, sums, spared, scale, mask)
    tile = tile._replace(DOUT=dout.to(q.dtype).contiguous(), LSE=lse.float().contiguous(), DELTA=delta.contiguous())
    after = torch.empty_like(tile.TABLE)
    b, rows, keys, warps = q.shape[0], len(reach), len(first), tile.ROWS.value // 8
    _scan_back[(keys, b)](tile, later.contiguous(), first, after, given, dk, num_stages=1, num_warps=warps)
    _first_back[(rows, b)](tile, after, reach, dq, num_stages=1, num_warps=warps)
    _queries_back[(rows, q.shape[2], b)](tile, reach, dq, num_stages=1, num_warps=warps)
    _keys_back[(keys, k.shape[2], b)](tile, first, dk, dv, num_stages=1, num_warps=warps)
    return dq, dk, dv, given


def _require(q: Tensor) -> None:
    reason = why_not(str(q.device), q.dtype)
    if reason is not None:
        raise Unsupported(f"A tile of {str(q.dtype).removeprefix('torch.')} on {q.device} was given to Triton: {reason}.")


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, j: Tensor, sums: Tensor, spared: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tile, Tensor, Tensor, Tensor]:
    """The tile with its table; for each block of rows how many keys its last row sees by index; for each block of keys the first
    block of rows that may see any; and what the rows gave each key.
    """
    (b, num_queries, h, d), (num_keys, g, e) = q.shape, v.shape[1:]
    rows = cols = _block(max(wide(d), wide(e)), q.element_size())
    last = torch.arange(rows - 1, num_queries + rows - 1, rows, device=q.device).clamp(max=num_queries - 1)
    reach = torch.searchsorted(j, i.index_select(0, last), right=True).int()
    first = (torch.searchsorted(i, j.index_select(0, torch.arange(0, num_keys, cols, device=q.device))) // rows).int()
    parts: list[Any] = [x.contiguous() for x in (q, k, v, i, j, spared.expand(b, num_keys))]
    parts += (None, 0, 0) if mask is None else (mask.contiguous(), mask.shape[1] if mask.shape[0] > 1 else 0, int(mask.shape[1] > 1))
    parts += q.new_empty(b, len(reach), num_keys, dtype=torch.float32), scale, num_queries, num_keys
    tile = Tile(*parts, *(tl.constexpr(x) for x in (h, g, d, e, rows, cols, wide(d), wide(e))))
    added = torch.empty_like(sums, memory_format=torch.contiguous_format)
    _scan[(len(first), b)](tile, sums.contiguous(), first, added, num_stages=2, num_warps=rows // 8)
    return tile, reach, first, added


def _block(width: int, itemsize: int) -> int:
    """Rows and keys of a block: to width 512 every kernel fits compute capability 8.0's shared memory, 163 KiB. A warp has 8 of
    the rows: with 16, ptxas moves registers of every kernel but `_scan` to memory."""
    return 64 if itemsize == 2 and width <= 128 else 32 if width * itemsize <= 512 else 16
