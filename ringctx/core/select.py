"""Selection: a selector looks at queries and keys and returns a pattern; attention then runs under pattern & selected.

Knows who asks the selector and when. Knows nothing of how a selector decides: those there are live in `ringctx.methods.selectors`.
Letters: b batch, s queries here, n keys here, h query heads, g key heads, d width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ringctx.core.attention import Attention, scale_of
from ringctx.core.layout import Layout
from ringctx.core.pattern import EMPTY, Pattern
from ringctx.core.ring import Ring
from ringctx.errors import RingctxError, Unsupported


@dataclass(frozen=True)
class Sight:
    """What a selector knows besides queries and keys.

    layout, key_layout: where queries and keys live. While decoding, every rank holds all queries, in the order of rank 0's ranges.
    scale: of the logits.
    """

    ring: Ring
    layout: Layout
    key_layout: Layout
    scale: float
    decoding: bool = False

    @property
    def length(self) -> int:
        """One more than the largest index of any query or key."""
        return max(self.layout.length, self.key_layout.length)


@runtime_checkable
class Selector(Protocol):
    """What looks at queries and keys, and says which keys are worth attending to; frozen, and printed by its content.

    Law: the pattern is the same on every rank, whatever the number of ranks and the layout. Ties go to the lower index.
    """

    prefill: bool
    """Whether it selects in `ring_attention`; where it does not, attention stays dense."""
    decode: bool
    """Whether it selects in `decode_attention`."""
    trains: bool
    """Whether models are trained with it: gradients flow through what was chosen, and none through the choice."""

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        """q (s h d) and k (n g d) of this rank, encoded -> who may see whom. All ranks call it together and exchange what they must."""


def select_problem(attention: Attention, q: Tensor, length: int, train: bool) -> RingctxError | None:
    """Why this attention cannot select for q (b s h d) among `length` indices, or None."""
    if attention.select is None:
        return None
    name = repr(attention.select).partition("(")[0]
    if train and not attention.select.trains:
        return Unsupported(f"{name} selects for inference and has no backward; call it under torch.no_grad(), or train without select.")
    if q.shape[0] != 1:
        return Unsupported(f"{name} selects for one sequence, and q has a batch of {q.shape[0]}; call it for each row by itself.")
    if length > 1 and attention.pattern.judge(range(1), range(1, 2)) is not EMPTY:
        return Unsupported(f"{name} selects among the keys before a query, and {attention.pattern} looks ahead; add causal() to it with &.")
    return None


def narrowed(q: Tensor, k: Tensor, sight: Sight, attention: Attention) -> Attention:
    """What is left of an attention for encoded q (1 s h d) and k (1 n g d): no encoding, no selector, and a narrower pattern."""
    selector, left = attention.select, replace(attention, encoding=None, select=None)
    if not (selector.decode if sight.decoding else selector.prefill):
        return left
    with torch.no_grad(), sight.ring.unbroken("selecting"):
        return replace(left, pattern=left.pattern & selector.select(q[0], k[0], sight))


def sight_of(ring: Ring, layout: Layout, key_layout: Layout, attention: Attention, width: int, decoding: bool = False) -> Sight:
    """What this attention's selector may know."""
    return Sight(ring, layout, key_layout, scale_of(attention, width), decoding)
