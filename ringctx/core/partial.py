"""Partial: attention over some of the keys, and the merge that makes partials whole.

Knows the merge alone. Letters: b batch, s query tokens, h heads, e value width.
Source: Milakov & Gimelshein 2018 (online softmax); the sigmoid form as in Liu et al. 2023's blockwise attention.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor


class Partial:
    """out (b s h e) and lse (b s h), both in the accumulation dtype, over the keys seen so far.

    Law: merging is associative and commutative, and `empty` (out 0, lse -inf) is its identity.
    """

    _like: tuple[tuple[int, int, int, int], torch.dtype, torch.device]

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self._seen: tuple[Tensor, Tensor] | None = (out, lse)

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Self:
        """The identity, for out of this shape (b, s, h, e). Its memory is made when something is merged that is not all of it."""
        found = cls.__new__(cls)
        found._seen, found._like = None, (shape, dtype, device)
        return found

    @property
    def out(self) -> Tensor:
        """(b s h e)."""
        return self._tensors()[0]

    @property
    def lse(self) -> Tensor:
        """(b s h)."""
        return self._tensors()[1]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._seen is None:
            shape, dtype, device = self._like
            out = torch.zeros(shape, dtype=dtype, device=device)
            self._seen = out, torch.full(shape[:3], -torch.inf, dtype=dtype, device=device)
        return self._seen

    def rows(self, start: int, stop: int) -> Partial:
        """Query rows start..stop-1; merging into it changes this partial."""
        if self._seen is None and (start, stop) == (0, self._like[0][1]):
            return self
        return Partial(self.out[:, start:stop], self.lse[:, start:stop])

    def merge_(self, out: Tensor, lse: Tensor) -> None:
        """Take in attention over further keys: out (b s h e) of any float dtype, lse (b s h); both are given away."""
        if self._seen is None and out.shape == self._like[0]:
            self._seen = out.to(self._like[1]).contiguous(), lse.to(self._like[1]).contiguous()
            return
        weight = torch.sigmoid(lse - self.lse).nan_to_num_(0.0)  # nan: neither has seen a key
        self.out.lerp_(out.to(self.out.dtype), weight.unsqueeze(-1))
        torch.logaddexp(self.lse, lse, out=self.lse)

    def add_sink_(self, sink: Tensor) -> None:
        """Let one more logit per head, sink (h,), share the denominator without a value of its own."""
        whole = torch.logaddexp(self.lse, sink.to(self.lse.dtype))
        self._seen = self.out.mul_(torch.exp(self.lse - whole).unsqueeze(-1)), whole
