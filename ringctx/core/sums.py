"""Sum: a gradient that tiles add to, a few tokens and heads at a time.

Knows shapes and dtypes alone. Letters: b batch, n tokens, h heads, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.kernels.base import accumulation_dtype

MOST_PIECES = 4
"""So few are kept apart: of home's two parts, and of what came from both neighbours."""


class Sum:
    """The sum of parts of a tensor shaped as `like` (b n h d), kept in its accumulation dtype; zero where no part reaches.

    Tokens that nothing was added to yet take a part as it is: most visits are one tile, home's parts share few tokens, and a pass over
    memory costs.
    """

    def __init__(self, like: Tensor) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._pieces: list[tuple[int, int, Tensor]] = []  # first token, end, their sum; ascending, and none has another's tokens

    def add(self, part: Tensor, tokens: tuple[int, int] | None = None, heads: tuple[int, ...] | None = None) -> None:
        """Add a part of any float dtype; it is for these tokens (all by default) and heads (all by default), and given away."""
        a, b = tokens or (0, self.shape[1])
        if heads is not None and heads != tuple(range(self.shape[2])):
            total = self.wide()[:, a:b]
            if heads == tuple(range(heads[0], heads[0] + len(heads))):
                total.narrow(2, heads[0], len(heads)).add_(part)
            else:
                total.index_add_(2, torch.tensor(heads, device=total.device), part.to(total.dtype))
            return
        pieces, at = list[tuple[int, int, Tensor]](), a
        for first, end, value in self._pieces:
            low, high = max(first, a), min(end, b)
            if low < high:
                value = value.to(accumulation_dtype(self.dtype)).contiguous()
                value[:, low - first : high - first].add_(part[:, low - a : high - a])
                pieces += [(at, low, part[:, at - a : low - a])] * (at < low)
                at = high
            pieces.append((first, end, value))
        pieces += [(at, b, part[:, at - a :])] * (at < b)
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        if len(self._pieces) > MOST_PIECES:
            self.wide()

    def room(self, tokens: int) -> Tensor:
        """Fresh memory for so many tokens of such a sum."""
        b, _, h, d = self.shape
        return torch.empty(b, tokens, h, d, dtype=accumulation_dtype(self.dtype), device=self.device)

    def wide(self) -> Tensor:
        """The sum so far in the accumulation dtype, contiguous; adding goes on in the same memory."""
        whole = self._whole(accumulation_dtype(self.dtype)).contiguous()
        self._pieces = [(0, self.shape[1], whole)]
        return whole

    def narrow(self) -> Tensor:
        """The sum rounded once to the dtype of `like`, perhaps strided. Its memory is given back: a next sum begins at zero."""
        whole, self._pieces = self._whole(self.dtype), []
        return whole

    def _whole(self, dtype: torch.dtype) -> Tensor:
        if [piece[:2] for piece in self._pieces] == [(0, self.shape[1])]:
            return self._pieces[0][2].to(dtype)
        whole = torch.empty(self.shape, dtype=dtype, device=self.device)
        at = 0
        for first, end, value in self._pieces:
            whole[:, at:first].zero_()
            whole[:, first:end].copy_(value)
            at = end
        whole[:, at:].zero_()
        return whole
