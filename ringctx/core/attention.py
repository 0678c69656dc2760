"""Attention: what is computed, as one value; the same for training, prefill and decode, on one rank or a thousand.

Knows the mathematics. Knows nothing of ranks, layouts or kernels. Its only dense definition is `ringctx.testing.dense`.
Letters: b batch, q and k tokens of a tile, h query heads, d key width, e value width, s tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from ringctx.core.branch import Branch, LinearEncoding, check_disjoint
from ringctx.core.carry import Carry
from ringctx.core.pattern import Causal, Pattern
from ringctx.errors import ConfigError, Unsupported
from ringctx.kernels.base import Elementwise

Params = tuple[Tensor, ...]
Seen = tuple[Pattern, LinearEncoding | None]
"""A pattern, and the encoding of the branch it belongs to; None where there is nothing to encode any more."""


class Encoding(Protocol):
    """What turns with position: applied to this rank's queries and keys before anything travels."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), position ids (s,) or (b, s) -> same shape and dtype."""

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), position ids (s,) or (b, s) -> same shape and dtype."""


@runtime_checkable
class AdditiveScore(Protocol):
    """A score that adds a number to each logit, known from head and indices: ALiBi, a bias table."""

    def params(self) -> Params:
        """The tensors it is made of, replicated on every rank. Their gradients are this rank's share, to be summed over the ring."""

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """What is added for these heads, queries i and keys j: (h or 1, q, k)."""

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """From dbias (b h q k) of one tile, that tile's contribution to each param's gradient, added to `into` if given."""


@dataclass(frozen=True, eq=False)
class Attention:
    """softmax(mask(additive(elementwise(scale q.k)))) v, with an optional sink in the denominator and dropout.

    pattern: who sees whom.  encoding: a rotary encoding of q and k by index, or None if they come encoded.
    branches: disjoint patterns with an encoding each, in the place of `encoding`; `pattern` narrows them all, and a key that it
    allows but no branch does is not seen.
    carry: a Carry, such as ringctx.methods.selective.Selective(): what earlier queries gave to a key is subtracted from its logits.
    scores: elementwise ones (a softcap) first, then additive ones.  sink: Tensor (h,), one more logit per head without a value.
    select: a Selector, which narrows the pattern to what its encoded queries and keys make worth attending to; inference alone.
    normaliser: "softmax", or "sum": weights exp(logit) that are summed as they are, divided by nothing.
    dropout: probability of dropping each weight.  scale: of the logits; 1/sqrt(d) when None.
    Raises ConfigError when the order of scores or the dropout cannot be right, Unsupported for what is not built yet.
    """

    pattern: Pattern = Causal()
    encoding: Encoding | None = None
    scores: tuple[Any, ...] = ()
    branches: tuple[Branch, ...] = ()
    carry: Carry | None = None
    sink: Tensor | None = None
    select: Any = None
    normaliser: str = "softmax"
    dropout: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        self._check_normaliser()
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in 0 <= p < 1; got {self.dropout}.")
        if not isinstance(self.pattern, Pattern):
            raise ConfigError(f"pattern must be a Pattern, such as ringctx.patterns.causal(); got {type(self.pattern).__name__}.")
        self._check_branches()
        self._check_carry()
        if self.select is not None and not hasattr(self.select, "select"):
            raise ConfigError(f"select must be a Selector, such as those of ringctx.methods.selectors; got {self.select!r}.")
        if self.select is not None and self.branches:
            raise Unsupported(
                "A selector compares encoded keys, and each branch encodes them otherwise; give select or branches, not both."
            )
        kinds = [_kind(score) for score in self.scores]
        if kinds != sorted(kinds, reverse=True):
            raise ConfigError("Scores run in the order elementwise (softcap), then additive (ALiBi, bias); list them so.")
        if self.sink is not None and self.sink.dim() != 1:
            raise ConfigError(f"sink must have one logit per query head, shape (h,); got {tuple(self.sink.shape)}.")

    def _check_normaliser(self) -> None:
        if self.normaliser not in ("softmax", "sum"):
            raise ConfigError(f"The normaliser {self.normaliser!r} is not known; there are 'softmax' and 'sum'.")
        for name in ("sink", "carry", "select"):
            if self.normaliser == "sum" and getattr(self, name) is not None:
                raise Unsupported(
                    f"normaliser='sum' divides weights by nothing, and {name} is defined by what they are divided by; leave it out."
                )

    def _check_branches(self) -> None:
        if not all(isinstance(branch, Branch) for branch in self.branches):
            raise ConfigError(f"branches is a tuple of Branch, as ringctx.methods.branches makes them; got {self.branches!r}.")
        if self.branches and self.encoding is not None:
            raise ConfigError("Attention was given an encoding and branches, which have an encoding each; leave `encoding` out.")
        check_disjoint(self.branches)

    def _check_carry(self) -> None:
        if self.carry is None:
            return
        if not isinstance(self.carry, Carry):
            raise ConfigError(f"carry must be a Carry, such as ringctx.methods.selective.Selective(); got {self.carry!r}.")
        for name in ("branches", "select"):
            if getattr(self, name):
                raise Unsupported(f"A carry grows from head 0's logits under one encoding and one pattern; leave {name} or carry out.")

    @property
    def seen(self) -> Pattern:
        """Who sees whom, in whichever branch."""
        return self.pattern & reduce(or_, (branch.pattern for branch in self.branches)) if self.branches else self.pattern

    def parts(self, num_heads: int) -> tuple[tuple[tuple[int, ...], tuple[Seen, ...]], ...]:
        """Groups of heads that see alike, each with what they see: one pattern, or one for each branch."""
        of_heads: dict[int, tuple[Seen, ...]] = {}
        for pattern, encoding in [(self.pattern & b.pattern, b.encoding) for b in self.branches] or [(self.pattern, None)]:
            for heads, part in pattern.heads(num_heads):
                of_heads |= {head: (*of_heads.get(head, ()), (part, encoding)) for head in heads}
        groups: dict[tuple[Seen, ...], list[int]] = {}
        for head in sorted(of_heads):
            groups.setdefault(of_heads[head], []).append(head)
        return tuple((tuple(heads), seen) for seen, heads in groups.items())

    def patterns(self, num_heads: int) -> tuple[Pattern, ...]:
        """Every pattern of `parts`: together, what some head sees."""
        return tuple(pattern for _, seen in self.parts(num_heads) for pattern, _ in seen)

    @property
    def elementwise(self) -> tuple[Elementwise, ...]:
        """Scores that map each logit by itself."""
        return tuple(s for s in self.scores if _kind(s) == "elementwise")

    @property
    def additive(self) -> tuple[AdditiveScore, ...]:
        """Scores that add to logits by head and indices."""
        return tuple(s for s in self.scores if _kind(s) == "additive")

    def params(self) -> list[Tensor]:
        """Every tensor in it, in a fixed order: the sink, then the scores' params."""
        sink = [] if self.sink is None else [self.sink]
        return [*sink, *(p for score in self.additive for p in score.params())]

    def key(self) -> Hashable:
        """Equal for attentions that differ only in the numbers inside their tensors."""
        scores = tuple(described(s) if _has_params(s) else s for s in self.scores)
        sink = None if self.sink is None else tuple(self.sink.shape)
        return (self.pattern, tuple(b.content for b in self.branches), self.carry, scores, sink, self.normaliser, self.dropout, self.scale)

    def text(self) -> str:
        """The same on every rank for equal keys, and different for different ones, as far as patterns and scores print their content."""
        scores = ", ".join(map(described, self.scores))
        sink = None if self.sink is None else tuple(self.sink.shape)
        branches = ", ".join(f"{b.pattern!r} by {_content(b.encoding)}" for b in self.branches)
        select = None if self.select is None else described(self.select)
        parts = f"{self.pattern!r}, branches ({branches}), carry {self.carry!r}, scores {scores}, sink {sink}, select {select}"
        return f"{parts}, normaliser {self.normaliser}, dropout {self.dropout!r}, scale {self.scale!r}"

    def __str__(self) -> str:
        says = lambda s: str(s) if _prints(s, "__str__") else described(s)
        branches = [f"branches ({'; '.join(map(str, self.branches))})"] if self.branches else []
        parts = [str(self.pattern), *branches, *map(says, self.scores)]
        parts += [] if self.carry is None else [str(self.carry)]
        parts += [] if self.select is None else [f"select {self.select}"]
        parts += ["sink"] * (self.sink is not None) + [f"dropout {self.dropout}"] * (self.dropout > 0)
        parts += ["summed"] * (self.normaliser == "sum")
        parts += [f"scale {self.scale}"] * (self.scale is not None)
        return ", ".join(parts)


def _kind(score: object) -> str:
    if isinstance(score, AdditiveScore):
        return "additive"
    if hasattr(score, "apply") and hasattr(score, "derivative"):
        return "elementwise"
    raise ConfigError(f"{score!r} is no score: it needs apply and derivative (elementwise), or params, bias and grads (additive).")


def _has_params(score: Any) -> bool:
    return isinstance(score, AdditiveScore) and bool(score.params())


def described(score: Any) -> str:
    """A score or selector in words that are the same in every process: content where it prints it, shapes where it holds tensors."""
    if _has_params(score):
        shapes = ", ".join(f"{tuple(p.shape)} {p.dtype}" for p in score.params())
        return f"{type(score).__qualname__}({shapes})"
    return _content(score)


def _content(part: object) -> str:
    return repr(part) if _prints(part, "__repr__") else type(part).__qualname__


def _prints(score: object, method: str) -> bool:
    """Whether it says what it is; object's own methods print where it lies in memory."""
    return getattr(type(score), method) is not getattr(object, method)


def scale_of(attention: Attention, width: int) -> float:
    """The factor on q.k for keys of this width; those of width 0 have logits from scores alone."""
    return cast(float, attention.scale if attention.scale is not None else max(width, 1) ** -0.5)


def finished(attention: Attention, out: Tensor, lse: Tensor) -> Tensor:
    """What comes of softmax's out (b s h e), or its gradient, with lse (b s h) under the normaliser: with `sum`, weights undivided."""
    if attention.normaliser == "softmax":
        return out
    return (out.to(lse.dtype) * lse.exp()[..., None]).to(out.dtype)
