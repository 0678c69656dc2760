"""What the fused kernels share: widths they lack, rows that see nothing, the gradient of lse, causal tiles.

Knows shapes only. Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.kernels.base import TileScores, accumulation_dtype

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""dout, q, k, v, out, all of one width -> dq, dk, dv of that width."""


def is_empty(*tensors: Tensor) -> bool:
    """True if any tensor (b n h d) has no batch, token or head; a fused kernel must then not be called (aten's kills the process)."""
    return any(0 in x.shape[:3] for x in tensors)


def nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out 0 (b q h e) and lse -inf (b q h) for queries q (b q h d) that see none of the values v (b k g e)."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    return out, q.new_full(q.shape[:3], -math.inf, dtype=accumulation_dtype(q.dtype))


def no_gradient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a tile in which nothing is seen."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def rows_of_lse(lse: Tensor) -> Tensor:
    """lse with 0 for rows that see nothing: a kernel given -inf returns NaN in all three gradients."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def require_square(q: Tensor, k: Tensor, scores: TileScores) -> None:
    """Kernels align a causal tile that is not square in different corners, so none is given one. Raises ConfigError."""
    if scores.causal and q.shape[1] != k.shape[1]:
        raise ConfigError(f"A causal tile is square, but this one has {q.shape[1]} queries and {k.shape[1]} keys; give it a mask instead.")


def exp_(x: Tensor) -> Tensor:
    """exp(x) in place, for x up to about 0; 0 where it is below 1e-34 (fp32) or 1e-304 (fp64).

    On CPUs exp is up to 30 times slower where its result underflows, and what reads denormal numbers is slower too.
    """
    least = -700.0 if x.dtype == torch.float64 else -80.0
    return x.clamp_(min=least).exp_().sub_(math.exp(least) * 1.0001).clamp_(min=0.0)


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dim is strided: aten's kernel reads such a tensor wrongly, without a word."""
    return x if x.stride(-1) == 1 else x.contiguous()


def widen(x: Tensor, width: int, column: Tensor | None = None) -> Tensor:
    """x (... d) -> (... width): first x, then `column` (... 1) if given, then zeros."""
    parts = [x] if column is None else [x, column.to(x.dtype)]
    missing = width - x.shape[-1] - len(parts) + 1
    if missing:
        parts.append(x.new_zeros(*x.shape[:-1], missing))
    return torch.cat(parts, -1) if len(parts) > 1 else x


def padded_backward(
    run: Backward,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dlse: Tensor | None,
    *,
    multiple: int = 1,
    widest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through a kernel that wants one width for keys and values and knows no gradient of lse.

    dlse (b q h) enters as one more value column: 1 in v, 0 in out, dlse in dout. Then dout.v gains dlse and dout.out
    gains nothing, which is exactly dA = P (dP - delta + dlse). Where no column is left, dlse gets a call of its own: the
    gradients are linear in (dout, dlse). Returns dq, dk, dv with the shapes of q, k, v.
    """
    d, e = q.shape[-1], v.shape[-1]
    width = -(-max(d, e + (dlse is not None)) // multiple) * multiple
    if dlse is not None and widest is not None and width > widest:
        dq, dk, dv = padded_backward(run, dout, q, k, v, out, None, multiple=multiple)
        blank = [x.narrow(-1, 0, 1) * 0 for x in (dout, v, out)]
        more_q, more_k, _ = padded_backward(run, blank[0], q, k, blank[1], blank[2], dlse, multiple=multiple)
        return dq + more_q, dk + more_k, dv
    column = None if dlse is None else dlse.unsqueeze(-1)
    one = None if dlse is None else torch.ones_like(v.narrow(-1, 0, 1))
    dq, dk, dv = run(widen(dout, width, column), widen(q, width), widen(k, width), widen(v, width, one), widen(out, width))
    return dq.narrow(-1, 0, d), dk.narrow(-1, 0, d), dv.narrow(-1, 0, e)
