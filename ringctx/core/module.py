"""Ring attention as an nn.Module, and as a function with the signature of torch's scaled_dot_product_attention.

For models that are not Hugging Face's. Letters: b batch, s tokens on this rank, h query heads, g key heads, d key width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.pattern import Causal, Full
from ringctx.core.ring import Ring
from ringctx.errors import Unsupported

_DEFAULT = Attention()


class RingAttention(nn.Module):
    """ring_attention with ring, layout and attention fixed; a learned sink is a parameter of this module.

    forward: q (b s h d), k (b s g d), v (b s g e) -> (b s h e). Raises what ring_attention raises.
    """

    def __init__(self, ring: Ring, layout: Layout, attention: Attention = _DEFAULT, **options: Any) -> None:
        super().__init__()
        self.ring, self.layout, self.attention, self.options = ring, layout, attention, options
        if isinstance(attention.sink, nn.Parameter):
            self.sink = attention.sink

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over the whole ring."""
        out = ring_attention(q, k, v, ring=self.ring, layout=self.layout, attention=self.attention, **self.options)
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        return f"{self.ring}, {self.layout}, {self.attention}"


def ring_sdpa(ring: Ring, layout: Layout, **options: Any) -> Callable[..., Tensor]:
    """A drop-in for torch.nn.functional.scaled_dot_product_attention, for tensors that are this rank's share of dim -2.

    The function it returns takes query (b h s d), key (b g s d), value (b g s e) and is_causal, scale, dropout_p, enable_gqa.
    It raises Unsupported for an attn_mask: a mask tensor knows no other ranks; give RingAttention a pattern instead.
    """

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None:
            raise Unsupported(
                "A mask tensor knows nothing of other ranks' tokens; leave attn_mask out, and give RingAttention a pattern instead."
            )
        if not enable_gqa and query.shape[1] != key.shape[1]:
            raise Unsupported(
                f"There are {query.shape[1]} query heads and {key.shape[1]} key heads; pass enable_gqa=True if that is meant."
            )
        attention = Attention(pattern=Causal() if is_causal else Full(), dropout=dropout_p, scale=scale)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, **options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return scaled_dot_product_attention
