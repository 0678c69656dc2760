"""Sighted: what methods with several attentions in one share, whether a sequence is read or a token decoded.

Knows the two entries of attention. Knows nothing of any method.
Letters: b batch, s queries here, n keys here, h query heads, g key heads, d and e widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.call import Call
from ringctx.core.decode import decode_problem, decode_with_lse
from ringctx.core.entry import ring_attention
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.core.select import Sight
from ringctx.errors import LayoutError


def sight_at(
    method: object,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    layout: Layout | None,
    key_layout: Layout | None = None,
    scale: float = 1.0,
) -> Sight:
    """Where q (b s h d) and k (b n g d), v (b n g e) live, once all ranks agree on it. layout None: decoding, all hold the newest tokens.

    method: printed by its content, the same on every rank. Raises LayoutError where neither layout is given or a tensor does not fit,
    Unsupported for gradients while decoding, RanksDisagree.
    """
    keys = key_layout or layout
    if keys is None:
        raise LayoutError("Decoding was asked without a layout of the keys; pass key_layout=..., in which the newest tokens are the last.")
    sight, plain = Sight(ring, layout or keys.newest(q.shape[1]), keys, scale, decoding=layout is None), Attention()
    call = Call(ring, sight.layout, keys, plain, "auto", "auto", train=False)
    problem = decode_problem(q, k, v, keys, ring, plain) if sight.decoding else call.problem(q, k, v)
    agree(ring, call.facts(q, k, v, str(method), 0, 0), problem)
    return sight


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
