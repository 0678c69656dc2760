"""What Triton's kernels share: how a program reads blocks of tokens of one head, multiplies them, and how large blocks are.

Knows no attention. In kernels capitals are tensors in memory and compile-time numbers; small letters are registers, (rows, cols) where
two-dimensional. Without Triton the module can be imported, and `why_not` says what is missing.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # `why_not` then says so
    triton = None
jit = triton.jit if triton else lambda kernel: kernel


@jit
def places(X, batch, at, count, head, HEADS, WIDTH, WIDE: tl.constexpr):
    """Where tokens `at` of one head of X (b count HEADS WIDTH) lie, (at, WIDE), and which of these places exist."""
    columns = tl.arange(0, WIDE)
    where = ((batch * count + at) * HEADS + head)[:, None] * WIDTH + columns[None, :]
    return X + where, (at < count)[:, None] & (columns < WIDTH)[None, :]


@jit
def load(X, batch, at, count, head, HEADS, WIDTH, WIDE: tl.constexpr):
    """These tokens of one head of X, (at, WIDE), 0 beyond the edges."""
    where, exist = places(X, batch, at, count, head, HEADS, WIDTH, WIDE)
    return tl.load(where, mask=exist, other=0.0)


@jit
def store(X, x, batch, at, count, head, HEADS, WIDTH, WIDE: tl.constexpr):
    """x (at, WIDE) as these tokens of one head of X."""
    where, exist = places(X, batch, at, count, head, HEADS, WIDTH, WIDE)
    tl.store(where, x, mask=exist)


@jit
def load_rows(t, batch, rows, head):
    """q, dout, lse and delta of one query head of tile t."""
    at = (batch * t.num_queries + rows) * t.H + head
    q = load(t.Q, batch, rows, t.num_queries, head, t.H, t.D, t.WIDE_D)
    dout = load(t.DOUT, batch, rows, t.num_queries, head, t.H, t.E, t.WIDE_E)
    exist = rows < t.num_queries
    return q, dout, tl.load(t.LSE + at, mask=exist, other=0.0), tl.load(t.DELTA + at, mask=exist, other=0.0)


@jit
def load_keys(t, batch, cols, head):
    """k and v of one key head of tile t."""
    k = load(t.K, batch, cols, t.num_keys, head, t.G, t.D, t.WIDE_D)
    return k, load(t.V, batch, cols, t.num_keys, head, t.G, t.E, t.WIDE_E)


@jit
def span(block, SIZE: tl.constexpr):
    """Places of this block's tokens in the tile; 64 bits, since what is computed of them may pass 2^31."""
    return tl.arange(0, SIZE).to(tl.int64) + block * SIZE


@jit
def products(x, y):
    """x (m w), y (n w) -> x y^T (m n) fp32. fp32 is multiplied as such, not as TF32: sums over a row of queries add up what is lost."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """None if tiles on this device and of this dtype are computed, else the reason in half a sentence."""
    if triton is None:
        return "Triton is not installed (pip install ringctx[triton])"
    interpreted = not isinstance(span, triton.JITFunction)
    if device.split(":")[0] != "cuda" and not interpreted:
        return "Triton's kernels need CUDA, or, to try them on a CPU, TRITON_INTERPRET=1 before they are imported"
    if dtype == torch.bfloat16 and interpreted:
        return "Triton's interpreter computes bfloat16 wrongly"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "computes float32, bfloat16 and float16 only"
    return None


def wide(width: int) -> int:
    """The power of two that holds this width; products of blocks want at least 16."""
    return max(16, triton.next_power_of_2(width))
