"""Hard-coded Gaussian attention: each head's weights are a bell around a fixed offset, whatever queries and keys say.

    w_ij = N(j - i - offset; 0, sigma^2)        not divided by their sum; 0 beyond `cut` sigmas, as part of the definition

Source: You, Sun & Iyyer 2020 (Hard-Coded Gaussian Attention, arXiv 2005.00742), section 3.
Only values travel, and of these no more than the bells reach. Knows indices. Knows nothing of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.methods.scores import Params
from ringctx.patterns import band, full, per_head


@dataclass(frozen=True)
class Bell:
    """log N(j - i - offset; 0, sigma^2), an offset a query head. Additive, without parameters."""

    offsets: tuple[int, ...]
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not self.offsets or not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ConfigError(
                f"A bell was asked with offsets {self.offsets} and sigma {self.sigma}; give one offset a head, sigma above 0."
            )

    def params(self) -> Params:
        """None."""
        return ()

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """(h q k)."""
        offsets = torch.tensor(self.offsets, dtype=dtype or torch.float64, device=i.device)[heads]
        off = (j - i[:, None]).to(offsets.dtype) - offsets[:, None, None]
        return -(off / self.sigma).square() / 2 - math.log(self.sigma * math.sqrt(2 * math.pi))

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """None."""
        return ()

    def __str__(self) -> str:
        return f"bells(offsets {', '.join(map(str, self.offsets))}, sigma {self.sigma:g})"


def gaussian(offsets: Sequence[int], sigma: float = 1.0, cut: float = 9.0, pattern: Pattern | None = None) -> Attention:
    """The attention of these bells, one offset j - i a query head; pattern narrows it, such as causal() in a decoder.

    Raises ConfigError where no key lies within `cut` sigmas of an offset.
    """
    bell, reach = Bell(tuple(int(x) for x in offsets), sigma), math.floor(cut * sigma)
    if cut * sigma < 0:
        raise ConfigError(f"Bells were cut at {cut} sigmas; write 0 or more, such as 9.")
    heads: dict[Pattern, list[int]] = {}
    for head, offset in enumerate(bell.offsets):
        heads.setdefault(band(offset - reach, offset + reach), []).append(head)
    bands = per_head({one: tuple(some) for one, some in heads.items()}) if len(heads) > 1 else next(iter(heads))
    return Attention(pattern=(full() if pattern is None else pattern) & bands, scores=(bell,), normaliser="sum")


def gaussian_attention(v: Tensor, *, ring: Ring, layout: Layout, attention: Attention, transport: str = "auto") -> Tensor:
    """v (b s h e) of this rank -> (b s h e): what `gaussian(...)` makes of values; queries and keys have no width and do not travel."""
    (bell,), (b, s, h, _) = attention.additive, v.shape
    if not isinstance(bell, Bell) or len(bell.offsets) != h:
        raise ConfigError(f"The values have {h} heads, and the attention {bell}; make it by gaussian(...) with one offset a head.")
    nothing = v.new_zeros(b, s, h, 0)
    found = ring_attention(nothing, nothing, v, ring=ring, layout=layout, attention=replace(attention, scale=1.0), transport=transport)
    assert isinstance(found, Tensor)
    return found
