"""Encodings made of a rotary one: CoCA, scores that grow with log n, and none at all.

A rotary encoding that is left out is the model's own once a model is wrapped (`turned`). Keys are cached before any of them.
Knows positions and frequencies. Knows nothing of models, caches or ranks.
Letters: b batch, s tokens on this rank, h query heads, g key heads, d head dim; m and n a query's and a key's index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.methods.rotary import Rotary


@dataclass(frozen=True)
class Coca:
    """Collinear constrained attention (Zhu et al. 2023, arXiv 2309.08646, section 3), slack as trained there, or strict.

    With t = relu(mean of the key's pair), the same for both dims of a pair (p, p + d/2), and R_n the rotation of position n, the logit is
        slack   (q * R_m q) . R_n t          strict   sum over pairs of t_p |q_p|^2 cos((m - n) theta_p)
    so a query is q * R_m q, or (|q_p|^2 cos m theta_p, |q_p|^2 sin m theta_p), a key R_n t or (t_p cos, t_p sin), and all the rest is
    ordinary attention. Slack depends on the positions themselves, not on their distance alone.
    rotary: turns all dims of a head; None until a wrapped model gives its own.
    """

    strict: bool = False
    rotary: Rotary | None = None

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), positions (s,) or (b, s) -> (b s h d)."""
        self._check(q)
        if not self.strict:
            return q * self._turn(q, positions)
        first, second = q.chunk(2, dim=-1)
        length = first.square() + second.square()
        return self._turn(torch.cat((length, torch.zeros_like(length)), -1), positions)

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), what the key projection gives, positions (s,) or (b, s) -> (b s g d)."""
        self._check(k)
        first, second = k.chunk(2, dim=-1)
        t = ((first + second) / 2).relu()
        return self._turn(torch.cat((t, torch.zeros_like(t) if self.strict else t), -1), positions)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        assert self.rotary is not None
        return self.rotary.rotate(x, positions)

    def _check(self, x: Tensor) -> None:
        if self.rotary is None or self.rotary.width != x.shape[-1]:
            has = "none" if self.rotary is None else f"of {self.rotary.width} dims"
            raise ConfigError(
                f"CoCA turns all {x.shape[-1]} dims of a head, and the rotary encoding here is {has}; give one of {x.shape[-1]} dims."
            )
        if self.rotary.interleaved:
            raise ConfigError("CoCA pairs dims by halves, as its authors' code does; give it a rotary encoding that is not interleaved.")

    def __str__(self) -> str:
        return "coca, strict" if self.strict else "coca"


@dataclass(frozen=True)
class LogN:
    """Queries multiplied by max(least, ln(m + 1) / ln N), so that a row's entropy stays where it was at N keys, its softmax's base being N.

    least 1: as ReRoPE's author has it, nothing changes within N. least 0: the entropy-invariant scale at every length.
    inner: the encoding below, linear where this stands in a branch; None turns nothing.
    Source: Su, kexue.fm/archives/8823 (entropy-invariant softmax), 9708 (log n with ReRoPE).
    """

    trained: int
    inner: Any = None
    least: float = 1.0

    def __post_init__(self) -> None:
        if self.trained < 2:
            raise ConfigError(f"LogN was given {self.trained} tokens of training; it divides by their logarithm, so give 2 or more.")

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), positions (s,) or (b, s) -> (b s h d)."""
        return self._scaled(q if self.inner is None else self.inner.queries(q, positions), positions)

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), positions (s,) or (b, s) -> (b s g d)."""
        found: Tensor = k if self.inner is None else self.inner.keys(k, positions)
        return found

    def queries_grad(self, dq: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `queries`, where `inner` is linear."""
        dq = self._scaled(dq, positions)
        found: Tensor = dq if self.inner is None else self.inner.queries_grad(dq, positions)
        return found

    def keys_grad(self, dk: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `keys`, where `inner` is linear."""
        found: Tensor = dk if self.inner is None else self.inner.keys_grad(dk, positions)
        return found

    def _scaled(self, q: Tensor, positions: Tensor) -> Tensor:
        by = (torch.log(positions.double() + 1) / math.log(self.trained)).clamp(min=self.least)
        return q * by[..., None, None].to(torch.promote_types(q.dtype, torch.float32)).to(q.dtype)

    def __str__(self) -> str:
        least = "" if self.least == 1 else f", at least {self.least:g}"
        return f"log_{self.trained} n{least}" + ("" if self.inner is None else f" over {self.inner}")


@dataclass(frozen=True)
class Unturned:
    """No position at all, also in a model that has one, as the last layer of HWFA (Su, kexue.fm/archives/9603)."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q itself."""
        return q

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k itself."""
        return k

    queries_grad, keys_grad = queries, keys


def turned(encoding: Any, rotary: Rotary | None, *, anew: bool) -> Any:
    """The encoding with these frequencies where it was given none, or everywhere with `anew`; a rotary one for None.

    rotary: None in a layer that turns nothing, where only CoCA, which needs them, is left as it is.
    """
    if encoding is None or (anew and isinstance(encoding, Rotary)):
        return rotary
    if isinstance(encoding, LogN):
        return replace(encoding, inner=turned(encoding.inner, rotary, anew=anew))
    if hasattr(encoding, "rotary") and (anew or encoding.rotary is None):
        if rotary is None and not isinstance(encoding, Coca):
            return None
        return replace(encoding, rotary=rotary)
    return encoding
