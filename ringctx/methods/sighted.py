"""Sighted: what methods with several attentions in one share, whether a sequence is read or a token decoded.

Knows the two entries of attention. Knows nothing of any method.
Letters: b batch, s queries here, n keys here, h query heads, g key heads, d and e widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.decode import decode_with_lse
from ringctx.core.entry import ring_attention
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.core.select import Sight
from ringctx.errors import LayoutError


def sight_at(
    method: object, q: Tensor, k: Tensor, *, ring: Ring, layout: Layout | None, key_layout: Layout | None, scale: float = 1.0
) -> Sight:
    """Where q (b s h d) and k (b n g d) live, once all ranks agree on it. layout None: decoding, when all hold the newest tokens.

    method: printed by its content, the same on every rank. Raises LayoutError where neither layout is given or a tensor does not fit,
    RanksDisagree.
    """
    keys = key_layout or layout
    if keys is None:
        raise LayoutError("Decoding was asked without a layout of the keys; pass key_layout=..., in which the newest tokens are the last.")
    sight = Sight(ring, layout or keys.newest(q.shape[1]), keys, scale, decoding=layout is None)
    facts = {"call": method, "batch": q.shape[0], "heads": (q.shape[2], *k.shape[2:]), "dtype": q.dtype, "decoding": sight.decoding}
    agree(ring, facts | {"layout": str(sight.layout), "key layout": str(keys)}, _problem(sight, q, k))
    return sight


def _problem(sight: Sight, q: Tensor, k: Tensor) -> LayoutError | None:
    """Why these tensors are not this rank's, or None."""
    if not sight.ring.size == sight.layout.size == sight.key_layout.size:
        return LayoutError(
            f"The ring has {sight.ring.size} ranks, and the layouts {sight.layout.size} and {sight.key_layout.size}; "
            f"make them for {sight.ring.size}."
        )
    have = q.shape[1], k.shape[1]
    want = sight.layout.count(0 if sight.decoding else sight.ring.rank), sight.key_layout.count(sight.ring.rank)
    if have != want:
        return LayoutError(
            f"q and k have {have[0]} and {have[1]} tokens, but the layouts give rank {sight.ring.rank} {want[0]} and {want[1]}."
        )
    return None


@dataclass(frozen=True)
class Chosen:
    """A selector that has chosen already: its pattern is planned, used once and dropped, as that of any selection. Models train with it."""

    pattern: Pattern
    prefill = decode = trains = True

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        """The pattern, which is the same on every rank."""
        return self.pattern

    def __repr__(self) -> str:
        return f"Chosen({self.pattern})"


def places(sight: Sight, q: Tensor) -> Tensor:
    """The indices of the queries here, (s)."""
    return sight.layout.indices(0 if sight.decoding else sight.ring.rank, q.device)


def attend_with_lse(
    sight: Sight, attention: Attention, q: Tensor, k: Tensor, v: Tensor, *, transport: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q (b s h d), k (b n g d), v (b n g e) -> out (b s h e), lse (b s h). All ranks call it together; decoding has no backward."""
    if sight.decoding:
        return decode_with_lse(q, k, v, key_layout=sight.key_layout, ring=sight.ring, attention=attention)
    found = ring_attention(
        *(q, k, v),
        ring=sight.ring,
        layout=sight.layout,
        key_layout=sight.key_layout,
        attention=attention,
        transport=transport,
        return_lse=True,
    )
    assert isinstance(found, tuple)
    return found


def attend(sight: Sight, attention: Attention, q: Tensor, k: Tensor, v: Tensor, *, transport: str = "auto") -> Tensor:
    """Without lse."""
    return attend_with_lse(sight, attention, q, k, v, transport=transport)[0]
