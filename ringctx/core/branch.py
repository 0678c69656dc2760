"""Branch: some of the pairs that an attention sees, under an encoding of their own.

Knows patterns and encodings. Knows nothing of ranks or kernels. ReRoPE, Self-Extend, LM-Infinite, StreamingLLM and dual chunk
attention are unions of branches (`ringctx.methods.branches`).
Letters: b batch, s tokens on this rank, h query heads, g key heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from ringctx.core.pattern import And, Not, Or, Pattern
from ringctx.errors import ConfigError


@runtime_checkable
class LinearEncoding(Protocol):
    """An encoding that is linear in what it encodes. Keys travel as they are and are encoded where they arrive, so the way back
    of a gradient is asked of it too. Frozen, hashable, and printed with its content: ranks compare it before a call."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), indices (s,) -> same shape and dtype."""

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), indices (s,) -> same shape and dtype."""

    def queries_grad(self, dq: Tensor, positions: Tensor) -> Tensor:
        """The gradient (b s h d) of encoded queries -> that of the queries: the transpose of `queries`."""

    def keys_grad(self, dk: Tensor, positions: Tensor) -> Tensor:
        """The gradient (b s g d) of encoded keys -> that of the keys: the transpose of `keys`."""


@dataclass(frozen=True)
class Branch:
    """The pairs that `pattern` allows, their queries and keys encoded by `encoding`, or not at all if it is None.

    Raises ConfigError where these are no pattern and no linear encoding.
    """

    pattern: Pattern
    encoding: LinearEncoding | None = None
    content: str = field(init=False, repr=False, compare=False)
    """All of it in print: what tells it from others, also while torch.compile traces, which cannot hash an encoding."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise ConfigError(f"A branch needs a Pattern, such as ringctx.patterns.window(4096); got {type(self.pattern).__name__}.")
        if self.encoding is not None and not isinstance(self.encoding, LinearEncoding):
            raise ConfigError(
                f"A branch was given the encoding {type(self.encoding).__name__}, which does not say how gradients come back; "
                "it needs queries, keys, queries_grad and keys_grad, as ringctx.methods.rotary.Rotary has them."
            )
        object.__setattr__(self, "content", repr(self))

    def __str__(self) -> str:
        return f"{self.pattern}" if self.encoding is None else f"{self.pattern} by {self.encoding}"


def check_disjoint(branches: tuple[Branch, ...]) -> None:
    """Raise ConfigError unless no pair is in two branches, as far as their patterns say so in so many words."""
    for n, later in enumerate(branches):
        for earlier in branches[:n]:
            if not disjoint(earlier.pattern, later.pattern):
                raise ConfigError(
                    f"Branches must be disjoint, or a pair would count twice, but {later.pattern} does not exclude {earlier.pattern}; "
                    "give the later one a pattern that ends in & ~(the earlier one)."
                )


def disjoint(left: Pattern, right: Pattern) -> bool:
    """Whether some part of one is the negation of a part of the other. True is certain; False means that it is not written so."""
    lefts, rights = set(_parts(left)), set(_parts(right))
    if any(Not(part) in rights for part in lefts) or any(Not(part) in lefts for part in rights):
        return True
    if isinstance(left, Or):
        return disjoint(left.left, right) and disjoint(left.right, right)
    return isinstance(right, Or) and disjoint(right, left)


def _parts(pattern: Pattern) -> Iterator[Pattern]:
    """The pattern, and if it is a conjunction those it consists of: wherever it allows a pair, so does each of them."""
    yield pattern
    match pattern:
        case And(left, right):
            yield from (*_parts(left), *_parts(right))
        case Not(Or(left, right)):
            yield from (*_parts(Not(left)), *_parts(Not(right)))
