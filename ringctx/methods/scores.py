"""What is done to logits before softmax: a softcap, and biases that depend on who looks at whom.

Knows indices of the whole sequence and whole-model head numbers. Knows nothing of ranks or kernels.
Letters: b batch, h query heads, q and k a tile's queries and keys, S tokens in the whole sequence.

A score is either elementwise (`apply`, `derivative`) or additive (`params`, `bias`, `grads`). The order is: scale,
elementwise scores, additive scores, mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ringctx.errors import ConfigError

Params = tuple[Tensor, ...]


class Additive(Protocol):
    """A score added to the logits.

    params: the tensors that may want gradients, in a fixed order; they come back to `bias` and `grads` so that autograd's
    own copies are used. heads (h,) are whole-model query-head numbers, i (q,) and j (k,) indices of the whole sequence.
    """

    def params(self) -> Params: ...

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """(h or 1, q, k); dtype is a wish, for scores without parameters, which else answer in float64."""

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """From dbias (b, h, q, k) this tile's part of the gradients: shaped like params, in dbias's dtype.

        With `into`, tensors shaped like params, the part is added to them in place and they are returned.
        """


@dataclass(frozen=True)
class Softcap:
    """Logits squeezed into (-cap, cap): cap tanh(x / cap). Elementwise."""

    cap: float

    def __post_init__(self) -> None:
        if not (self.cap > 0 and math.isfinite(self.cap)):
            raise ConfigError(f"Softcap was asked with {self.cap}; a cap is positive and finite, 30.0 and 50.0 are common.")

    def apply(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.cap) * self.cap

    def derivative(self, logits: Tensor) -> Tensor:
        return 1 - torch.tanh(logits / self.cap).square()

    def __str__(self) -> str:
        return f"softcap({self.cap:g})"


@dataclass(frozen=True)
class SquaredRelu:
    """log(factor relu(x)^2): with Attention(normaliser="sum") the weights of GAU, squared logits where these are positive, else 0.

    factor: such as 1 / n for n tokens (Hua et al. 2022, FLASH, arXiv 2202.10447, equation 4). Elementwise.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ConfigError(f"SquaredRelu was asked with factor {self.factor}; it is positive and finite, such as 1 / n.")

    def apply(self, logits: Tensor) -> Tensor:
        seen = logits > 0
        return torch.where(seen, 2 * logits.where(seen, 1.0).log() + math.log(self.factor), -math.inf)

    def derivative(self, logits: Tensor) -> Tensor:
        seen = logits > 0
        return torch.where(seen, 2 / logits.where(seen, 1.0), 0.0)

    def __str__(self) -> str:
        return f"squared relu x {self.factor:g}"


@dataclass(frozen=True)
class Alibi:
    """-slope |i - j|, one slope a query head, fixed. Additive, without parameters."""

    slopes: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", tuple(float(slope) for slope in self.slopes))
        if not self.slopes:
            raise ConfigError("Alibi was asked with no slopes; give one a query head, or write Alibi.standard(num_heads).")

    @classmethod
    def standard(cls, num_heads: int) -> Alibi:
        """The paper's slopes: 2^(-8n/h) for n = 1..h.

        If h is no power of two: those of the power below, then every other one of the power above.
        """
        if num_heads < 1:
            raise ConfigError(f"Alibi was asked for {num_heads} heads; there is at least one.")
        below = 1 << (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8.0 * n / below) for n in range(1, below + 1)]
        more = [2.0 ** (-4.0 * n / below) for n in range(1, 2 * below + 1, 2)]
        return cls(tuple((slopes + more)[:num_heads]))

    def params(self) -> Params:
        return ()

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        require_heads(self, len(self.slopes), heads)
        slopes = torch.tensor(self.slopes, dtype=dtype or torch.float64, device=i.device)[heads]
        distance = (i[:, None] - j).abs().to(slopes.dtype)
        return -slopes[:, None, None] * distance

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        return ()

    def __str__(self) -> str:
        return f"alibi({', '.join(f'{slope:g}' for slope in self.slopes)})"


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """A learned number for each head and distance i - j, clamped to -(n-1) .. n-1. Additive.

    table (h or 1, 2n-1): column n-1 is distance 0, later columns are keys further in the past. Equal only to itself.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] % 2 == 0:
            raise ConfigError(f"DistanceBias was given a table {tuple(self.table.shape)}; it is (heads or 1, 2n-1), distance 0 amid.")

    def params(self) -> Params:
        return (self.table,)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        (table,) = params
        require_heads(self, table.shape[0], heads)
        rows = table if table.shape[0] == 1 else table[heads]
        return rows[:, self._column(i, j)]

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        (total,) = into or (torch.zeros(self.table.shape, dtype=dbias.dtype, device=dbias.device),)
        per_head = dbias.sum(0, dtype=torch.float64)  # a clamped distance gathers most pairs, and they cancel
        if total.shape[0] == 1:
            per_head, heads = per_head.sum(0, keepdim=True), torch.zeros(1, dtype=torch.long, device=dbias.device)
        column = self._column(i, j).flatten()
        sums = per_head.new_zeros(len(heads), total.shape[1]).index_add_(1, column, per_head.flatten(1))
        total.index_add_(0, heads, sums.to(total.dtype))
        return (total,)

    def _column(self, i: Tensor, j: Tensor) -> Tensor:
        furthest = self.table.shape[1] // 2
        return (i[:, None] - j).clamp(-furthest, furthest) + furthest

    def __str__(self) -> str:
        return f"distance_bias{_described(self.table)}"


@dataclass(frozen=True, eq=False)
class PairBias:
    """A learned number for each head, query and key. Additive.

    table (h or 1, S, S), query before key. Equal only to itself.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 3 or self.table.shape[1] != self.table.shape[2]:
            raise ConfigError(f"PairBias was given a table {tuple(self.table.shape)}; it is (heads or 1, S, S), S the whole sequence.")

    def params(self) -> Params:
        return (self.table,)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        (table,) = params
        require_heads(self, table.shape[0], heads)
        rows = table.new_zeros(1, dtype=torch.long) if table.shape[0] == 1 else heads
        return table[rows[:, None, None], i[:, None], j]

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        (total,) = into or (torch.zeros(self.table.shape, dtype=dbias.dtype, device=dbias.device),)
        per_head = dbias.sum(0)
        if total.shape[0] == 1:
            per_head, heads = per_head.sum(0, keepdim=True), torch.zeros(1, dtype=torch.long, device=dbias.device)
        total.index_put_((heads[:, None, None], i[:, None], j), per_head.to(total.dtype), accumulate=True)
        return (total,)

    def __str__(self) -> str:
        return f"pair_bias{_described(self.table)}"


def require_heads(score: object, num_heads: int, heads: Tensor) -> None:
    """Raises ConfigError if a head has no row; a table of one row serves all heads."""
    asked = int(heads.max()) + 1 if heads.numel() else 0
    one_for_all = num_heads == 1 and not isinstance(score, Alibi)
    if asked > num_heads and not one_for_all:
        name = type(score).__name__
        raise ConfigError(f"{name} has numbers for {num_heads} heads, but a query has head {asked - 1}; give one row a query head.")


def _described(table: Tensor) -> str:
    """(8, 255, float32): shape and dtype, equal on all ranks that hold equal tables."""
    return f"({', '.join(map(str, table.shape))}, {str(table.dtype).removeprefix('torch.')})"
