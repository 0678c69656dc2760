"""Branches: distances between tokens other than i - j, as a union of disjoint patterns with rotary positions of their own.

    Attention(branches=rerope(1_024, rotary))       # the attention's own pattern, causal here, narrows them

ReRoPE, Leaky ReRoPE, Self-Extend, LM-Infinite, StreamingLLM and dual chunk attention read beyond the trained length without
training. Each function returns the branches; a model that is wrapped gives its own frequencies where `rotary` is left out.
Knows indices and positions. Knows nothing of ranks or kernels.
Letters: b batch, s tokens, h heads, d head dim, i a query's index, j a key's, W a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.branch import Branch
from ringctx.core.rules import Chunks
from ringctx.errors import ConfigError, Unsupported
from ringctx.methods.encodings import LogN, turned
from ringctx.methods.rotary import Rotary
from ringctx.patterns import sinks, window

Branches = tuple[Branch, ...]


@dataclass(frozen=True)
class Place:
    """Index -> rotary position: min(cap, shift + (index mod period) / divisor), the quotient rounded down where `whole`."""

    shift: float = 0
    divisor: float = 1
    whole: bool = True
    period: int | None = None
    cap: float | None = None

    def __call__(self, indices: Tensor) -> Tensor:
        """indices int64 (s,) -> positions (s,), int64 where they are whole, else float64."""
        at = indices if self.period is None else indices % self.period
        if self.divisor != 1:
            at = at // self.divisor if self.whole else at.double() / self.divisor
        at = at + self.shift if self.shift else at
        return at if self.cap is None else at.clamp(max=self.cap)

    def __str__(self) -> str:
        if self.period == 1:
            return f"{self.shift:g}"
        text = "index" if self.period is None else f"index mod {self.period}"
        text = f"{text} {'//' if self.whole else '/'} {self.divisor:g}" if self.divisor != 1 else text
        text = f"{self.shift:g} + {text}" if self.shift else text
        return text if self.cap is None else f"min({self.cap:g}, {text})"


HERE = Place()
"""The index itself."""


def always(position: int) -> Place:
    """One position for all tokens."""
    return Place(position, period=1)


@dataclass(frozen=True)
class Placed:
    """A rotary encoding of queries and keys at positions of their own.

    rotary: the frequencies; None until a wrapped model gives its own.
    """

    rotary: Rotary | None = None
    of_queries: Place = HERE
    of_keys: Place = HERE
    _turns: tuple[Rotary, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.rotary is not None:  # one each: a Rotary keeps the table of the positions it was asked for last
            object.__setattr__(self, "_turns", (replace(self.rotary), replace(self.rotary)))

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), indices (s,) -> (b s h d)."""
        return self._turn(0, q, self.of_queries, positions)

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), indices (s,) -> (b s g d)."""
        return self._turn(1, k, self.of_keys, positions)

    def queries_grad(self, dq: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `queries`."""
        return self._turn(0, dq, self.of_queries, positions, back=True)

    def keys_grad(self, dk: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `keys`."""
        return self._turn(1, dk, self.of_keys, positions, back=True)

    def _turn(self, side: int, x: Tensor, place: Place, indices: Tensor, *, back: bool = False) -> Tensor:
        if self.rotary is None:
            raise ConfigError(
                "These branches have no rotary frequencies; give the method a Rotary, such as rerope(1024, rotary), "
                "or hand them to huggingface.wrap, which gives the model's own."
            )
        if place == always(0) and self.rotary.scaling == 1:
            return x  # nothing turns at position 0
        return self._turns[side].rotate(x, place(indices), back=back)

    def __str__(self) -> str:
        return f"queries at {self.of_queries} and keys at {self.of_keys}"


def rerope(W: int, rotary: Rotary | None = None) -> Branches:
    """ReRoPE (Su, kexue.fm/archives/9708): distance min(i - j, W)."""
    _whole("rerope", W=W)
    near = window(W)
    return Branch(near, Placed(rotary)), Branch(~near, Placed(rotary, always(W), always(0)))


def leaky_rerope(W: int, factor: float, rotary: Rotary | None = None) -> Branches:
    """Leaky ReRoPE (Su, kexue.fm/archives/9708): distance i - j below W, then W + (i - j - W) / factor."""
    _whole("leaky_rerope", W=W)
    if not 1 <= factor < math.inf:
        raise ConfigError(f"leaky_rerope was given factor {factor}; positions beyond the window are divided by 1 or more, such as 8.")
    near = window(W)
    far = Placed(rotary, Place(W - W / factor, factor, whole=False), Place(0, factor, whole=False))
    return Branch(near, Placed(rotary)), Branch(~near, far)


def self_extend(W: int, group: int, rotary: Rotary | None = None) -> Branches:
    """Self-Extend (Jin et al. 2024, arXiv 2401.01325): distance i - j below W, then (i // G + W - W // G) - j // G, G the group."""
    _whole("self_extend", W=W, group=group)
    near = window(W)
    return Branch(near, Placed(rotary)), Branch(~near, Placed(rotary, Place(W - W // group, group), Place(0, group)))


def lm_infinite(W: int, num_sinks: int, length: int | None = None, rotary: Rotary | None = None) -> Branches:
    """LM-Infinite (Han et al. 2024, arXiv 2308.16137): the latest W keys and the first `num_sinks`, at distance min(i - j, length).

    length: the trained one, W if it is left out; at least W. Other keys are not seen.
    """
    length = W if length is None else length
    _whole("lm_infinite", W=W, num_sinks=num_sinks, length=length)
    if length < W:
        raise ConfigError(f"lm_infinite was given length {length} below the window {W}; inside the window no distance is cut, so raise it.")
    near, first = window(length), sinks(num_sinks)
    seen = near if length == W else near & (window(W) | first)
    return Branch(seen, Placed(rotary)), Branch(first & ~near, Placed(rotary, always(length), always(0)))


def streaming(W: int, num_sinks: int, rotary: Rotary | None = None) -> Branches:
    """StreamingLLM (Xiao et al. 2024, arXiv 2309.17453): the latest W keys and the first `num_sinks`; positions count what is kept.

    The first keys stand at their index and the query at min(i, num_sinks + W - 1), the last place of a full cache; keys of the
    window follow each other, so their distance is i - j. Other keys are not seen.
    """
    _whole("streaming", W=W, num_sinks=num_sinks)
    near = window(W)
    return Branch(near, Placed(rotary)), Branch(sinks(num_sinks) & ~near, Placed(rotary, Place(cap=num_sinks + W - 1)))


def dual_chunk(chunk: int, length: int, rotary: Rotary | None = None) -> Branches:
    """Dual chunk attention (An et al. 2024, arXiv 2402.17463): keys stand at j mod s, s the chunk, c the trained length.

    Queries stand at i mod s for keys of their own chunk, at min(s + i mod s, c - 1) for those of the chunk before, and at c - 1
    for those further back. s < c; distances below c - s are all i - j.
    """
    _whole("dual_chunk", chunk=chunk, length=length)
    if chunk >= length:
        raise ConfigError(
            f"dual_chunk was given chunks of {chunk} and a trained length of {length}; a chunk is shorter, such as 3/4 of it."
        )
    inside = Place(period=chunk)
    own, neighbours = Chunks(chunk, 1), Chunks(chunk, 2)
    return (
        Branch(own, Placed(rotary, inside, inside)),
        Branch(neighbours & ~own, Placed(rotary, Place(chunk, period=chunk, cap=length - 1), inside)),
        Branch(~neighbours & ~own, Placed(rotary, always(length - 1), inside)),
    )


def rotated_by(attention: Attention, rotary: Rotary | None, *, anew: bool = False) -> Attention:
    """The attention with these frequencies where none were given, or everywhere with `anew`; None turns nothing.

    Raises Unsupported for a branch whose encoding is not rotary, which has no frequencies to be replaced.
    """
    if not attention.branches:
        encoding = turned(attention.encoding, rotary, anew=anew)
        return attention if encoding is attention.encoding else replace(attention, encoding=encoding)
    return replace(attention, branches=tuple(_rotated(branch, rotary, anew) for branch in attention.branches))


def _rotated(branch: Branch, rotary: Rotary | None, anew: bool) -> Branch:
    encoding = branch.encoding
    if encoding is None:
        return branch
    if anew and not isinstance(encoding, Rotary | Placed | LogN):
        raise Unsupported(f"The branch {branch} is not rotary, so it cannot turn by other frequencies; leave attention.positions out.")
    return replace(branch, encoding=turned(encoding, rotary, anew=anew))


def _whole(method: str, **numbers: int) -> None:
    """Raise ConfigError unless all are whole numbers of 1 or more."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{method} was given {name} {number!r}; write a whole number of 1 or more.")
