"""Sum: a gradient that tiles add to, a few tokens and heads at a time.

Knows shapes and dtypes alone. Letters: b batch, n tokens, h heads, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.kernels.base import accumulation_dtype


class Sum:
    """The sum of parts of a tensor shaped as `like` (b n h d), kept in its accumulation dtype; zero where no part reaches.

    A first part that covers all of it is taken as it is: most visits are one tile, and a pass over memory costs.
    """

    def __init__(self, like: Tensor) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._value: Tensor | None = None

    def add(self, part: Tensor, tokens: tuple[int, int] | None = None, heads: tuple[int, ...] | None = None) -> None:
        """Add a part of any float dtype; it is for these tokens (all by default) and heads (all by default), and given away."""
        if self._value is None and part.shape == self.shape and (heads is None or heads == tuple(range(len(heads)))):
            self._value = part
            return
        total = self.wide()
        total = total if tokens is None else total[:, tokens[0] : tokens[1]]
        if heads is None or heads == tuple(range(heads[0], heads[0] + len(heads))):
            (total if heads is None else total.narrow(2, heads[0], len(heads))).add_(part)
        else:
            total.index_add_(2, torch.tensor(heads, device=total.device), part.to(total.dtype))

    def room(self, tokens: int) -> Tensor:
        """Fresh memory for so many tokens of such a sum."""
        b, _, h, d = self.shape
        return torch.empty(b, tokens, h, d, dtype=accumulation_dtype(self.dtype), device=self.device)

    def wide(self) -> Tensor:
        """The sum so far in the accumulation dtype, contiguous; adding goes on in the same memory."""
        if self._value is None:
            self._value = self.room(self.shape[1]).zero_()
        self._value = self._value.to(accumulation_dtype(self.dtype)).contiguous()
        return self._value

    def narrow(self) -> Tensor:
        """The sum rounded once to the dtype of `like`, perhaps strided. Its memory is given back: a next sum begins at zero."""
        whole, self._value = self.wide() if self._value is None else self._value, None
        return whole.to(self.dtype)
