"""What a kernel is asked and what it answers: attention of one tile on one device.

Knows shapes, dtypes and devices. Knows nothing of ranks, layouts or messages; masks arrive as callables.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, merges, carries and travelling gradients: fp32, and fp64 for fp64 queries."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Elementwise(Protocol):
    """A score that maps every logit by itself, such as a softcap."""

    def apply(self, logits: Tensor) -> Tensor:
        """Map logits, any shape, without changing their dtype."""

    def derivative(self, logits: Tensor) -> Tensor:
        """The derivative of `apply` at these (unmapped) logits."""


@dataclass(frozen=True)
class TileScores:
    """What happens to the logits of one tile, in this order: scale, elementwise, bias, mask, softmax, keep.

    causal: the tile is square and aligned; row r sees column c when c <= r.
    mask: () -> bool, broadcastable to (b, h, q, k); True where the query may see the key.
    bias: () -> float, broadcastable to (b, h, q, k), added to the logits.
    bias_grad: called in backward with the gradient of the biased logits, (b, h, q, k).
    keep: () -> float (b, h, q, k): dropout's multiplier of each probability, 0 or 1/(1-p).
    """

    scale: float
    causal: bool = False
    mask: Callable[[], Tensor] | None = None
    elementwise: tuple[Elementwise, ...] = ()
    bias: Callable[[], Tensor] | None = None
    bias_grad: Callable[[Tensor], None] | None = None
    keep: Callable[[], Tensor] | None = None


Tile = tuple[int, int, int, int, int, int]
"""Part of a rectangle, (low, high, first query, end of queries, first key, end of keys): query i sees its key j where low <= j - i <= high,
both counted from the rectangle's corner."""


@dataclass(frozen=True)
class Call:
    """The facts on which a kernel accepts or refuses a tile; equal for all tiles of one kind in one call."""

    device: str
    dtype: torch.dtype
    h: int
    g: int
    d: int
    e: int
    causal: bool = False
    mask: bool = False
    elementwise: bool = False
    bias: bool = False
    bias_grad: bool = False
    dropout: bool = False
    backward: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("causal", "mask", "elementwise", "bias", "bias_grad", "dropout", "backward") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.h} query and {self.g} key heads"
        return f"{dtype} on {self.device}, {heads}, width {self.d}, values {self.e}, {' + '.join(extras) or 'plain'}"


class Kernel(Protocol):
    """Attention of a run of tiles on one device.

    forward:  q (b q h d), k (b k g d), v (b k g e) -> out (b q h e) in q's or the accumulation dtype, lse (b q h) in the
              accumulation dtype, natural logarithm; a row that sees nothing gets out 0 and lse -inf.
    backward: the same tensors with the *whole* row's out (q's dtype) and lse (finite; 0 where the row sees nothing
              anywhere), and optionally the gradient dlse (b q h) of lse
              -> dq, dk, dv with the shapes of q, k, v, in q's or the accumulation dtype.
    h is a multiple of g; query head n reads key head n // (h // g). No dimension is empty. Inputs may be strided
    anywhere but in their last dim.
    A kernel that computes many tiles of one rectangle in one call has an `edge`, and takes them as `tiles`. Their borders are multiples of
    it but at the rectangle's ends; high - low is 2 edge - 2 or more, so that no square of that edge holds both borders of a band.
    """

    name: str

    def why_not(self, call: Call) -> str | None:
        """None if this kernel computes such a call exactly, else the reason in half a sentence."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...
