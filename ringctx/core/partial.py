"""Partial: attention over some of the keys, and the merge that makes partials whole.

Knows the merge alone. Letters: b batch, s query tokens, h heads, e value width.
Source: Milakov & Gimelshein 2018 (online softmax); the sigmoid form as in Liu et al. 2023's blockwise attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Partial:
    """out (b s h e) and lse (b s h), both in the accumulation dtype, over the keys seen so far.

    Law: merging is associative and commutative, and `empty` (out 0, lse -inf) is its identity.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Self:
        """The identity, for out of this shape (b, s, h, e)."""
        out = torch.zeros(shape, dtype=dtype, device=device)
        return cls(out, torch.full(shape[:3], -torch.inf, dtype=dtype, device=device))

    def rows(self, start: int, stop: int) -> Partial:
        """A view of query rows start..stop-1; merging into it changes this partial."""
        return Partial(self.out[:, start:stop], self.lse[:, start:stop])

    def merge_(self, out: Tensor, lse: Tensor) -> None:
        """Take in attention over further keys: out (b s h e) of any float dtype, lse (b s h)."""
        weight = torch.sigmoid(lse - self.lse).nan_to_num_(0.0)  # nan: neither has seen a key
        self.out.lerp_(out.to(self.out.dtype), weight.unsqueeze(-1))
        torch.logaddexp(self.lse, lse, out=self.lse)

    def add_sink_(self, sink: Tensor) -> None:
        """Let one more logit per head, sink (h,), share the denominator without a value of its own."""
        whole = torch.logaddexp(self.lse, sink.to(self.lse.dtype))
        self.out.mul_(torch.exp(self.lse - whole).unsqueeze(-1))
        self.lse = whole
