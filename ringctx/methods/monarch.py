"""Monarch matrices: two block-diagonal products and a transpose, on one rank or spread over many.

    M[(i, j), (k, l)] = L[j, i, k] R[k, j, l]        n = m^2, an index (i, j) being i m + j

Source: Dao et al. 2022 (Monarch, arXiv 2204.00595); the closed form of the best approximation is theirs, retold by Su
(kexue.fm/archives/10249). A token mixer, not attention over keys: it is not causal.
Knows matrices and rings. Knows nothing of models. Letters: m blocks of m x m, W ranks, c columns (batch and features).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ringctx.core.gathered import traded
from ringctx.core.header import agree
from ringctx.core.ring import Ring
from ringctx.errors import LayoutError

Factors = tuple[Tensor, Tensor]
"""L (m m m) by j, i, k, and R (m m m) by k, j, l."""


def multiply(factors: Factors, x: Tensor) -> Tensor:
    """M x, for x (n c): 2 n^1.5 c multiplications instead of n^2 c. Raises LayoutError where n is not m^2."""
    left, right = factors
    m = _blocks(factors, len(x))
    inner = torch.einsum("kjl,klc->kjc", right, x.reshape(m, m, -1))
    return torch.einsum("jik,kjc->ijc", left, inner).reshape(x.shape)


def dense(factors: Factors) -> Tensor:
    """M itself (n n)."""
    left, right = factors
    m = len(left)
    return torch.einsum("jik,kjl->ijkl", left, right).reshape(m * m, m * m)


def approximate(matrix: Tensor) -> Factors:
    """The Monarch matrix next to a matrix (n n) by Frobenius' norm: of each slice A[:, j, k, :] (m m) the first singular pair.

    Raises LayoutError where n is no square.
    """
    m = math.isqrt(len(matrix))
    if m * m != len(matrix) or matrix.shape[0] != matrix.shape[1]:
        raise LayoutError(f"A Monarch matrix has m^2 rows and columns; this one is {tuple(matrix.shape)}, so pad it to {(m + 1) ** 2}.")
    slices = matrix.reshape(m, m, m, m).permute(1, 2, 0, 3)  # (j k i l)
    u, s, v = torch.linalg.svd(slices)
    root = s[..., :1].sqrt()
    return (u[..., 0] * root).transpose(1, 2).contiguous(), (v[..., 0, :] * root).transpose(0, 1).contiguous()


def ring_multiply(factors: Factors, x: Tensor, ring: Ring) -> Tensor:
    """This rank's rows of M x: x (n/W c) are its rows, contiguous blocks k, and M x comes back so. All ranks must call it together.

    One all-to-all between the two products: rank r multiplies by R[k] for its blocks k, sends the rows j that rank j's blocks need,
    and multiplies by L[j] for its blocks j, whose results are rows (., j), traded once more into rows (i, .). Differentiable.
    factors: whole, on every rank; their gradients are this rank's share, to be summed over the ring.
    Raises LayoutError where the ranks do not divide m.
    """
    left, right = factors
    m = _blocks(factors, len(x) * ring.size)
    if m % ring.size:
        raise LayoutError(f"{ring.size} ranks cannot share {m} blocks of a Monarch matrix alike; start a number of ranks that divides {m}.")
    agree(ring, {"what": "Monarch product", "factors": tuple(left.shape), "columns": tuple(x.shape[1:]), "dtype": x.dtype})
    mine = slice(ring.rank * m // ring.size, (ring.rank + 1) * m // ring.size)
    inner = torch.einsum("kjl,klc->jkc", right[mine], x.reshape(m // ring.size, m, -1))
    outer = torch.einsum("jik,jkc->ijc", left[mine], transposed(inner, ring))
    return transposed(outer, ring).reshape(x.shape)


def transposed(x: Tensor, ring: Ring) -> Tensor:
    """(m m/W c), the second index this rank's  ->  (m/W m c), the first index this rank's: one all-to-all."""
    found: Tensor = _Trade.apply(x, ring)
    return found


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ring: Ring) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.ring = ring
        return torch.cat(_trade(x.chunk(ring.size, 0), ring), 1)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return torch.cat(_trade(dx.chunk(ctx.ring.size, 1), ctx.ring, grads=True), 0), None


def _trade(parts: Sequence[Tensor], ring: Ring, *, grads: bool = False) -> list[Tensor]:
    return traded(ring, parts, parts, "monarch", grads=grads)


def _blocks(factors: Factors, n: int) -> int:
    m = len(factors[0])
    if any(tuple(x.shape) != (m, m, m) for x in factors) or n != m * m:
        shapes = " and ".join(str(tuple(x.shape)) for x in factors)
        raise LayoutError(f"A Monarch matrix of {n} rows has two factors (m m m) with m^2 = {n}; these are {shapes}.")
    return m
