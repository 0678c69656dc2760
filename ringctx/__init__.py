"""ringctx: exact attention over sequences too long for one device.

Letters, everywhere: b batch · s tokens on this rank · S tokens in the whole sequence · h query heads · g key/value heads ·
d head dim · n cached tokens on this rank · R ranks that share the sequence · W a window. Tensors are (b, s, h, d), the
sequence always dim 1; lse is (b, s, h). An index is a token's place in the whole sequence.
"""

from ringctx.core.attention import Attention
from ringctx.core.decode import decode_attention
from ringctx.core.entry import explain, ring_attention
from ringctx.core.layout import Layout
from ringctx.core.module import RingAttention, ring_sdpa
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError, LayoutError, RankLost, RanksDisagree, RingctxError, Unsupported

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "ConfigError",
    "Layout",
    "LayoutError",
    "RankLost",
    "RanksDisagree",
    "Ring",
    "RingAttention",
    "RingctxError",
    "Unsupported",
    "decode_attention",
    "explain",
    "ring_attention",
    "ring_sdpa",
]
