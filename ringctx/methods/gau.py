"""GAU, the gated attention unit: one head of attention between two gates takes the place of attention and MLP.

    O = (U * A V) W_o      U, V = silu(x W_u), silu(x W_v)      q, k = gamma * z + beta, of one shared z = silu(x W_z)

A is relu(q k / sqrt(d))^2 / n, summed as it is, or softmax(q k / sqrt(d)).
Source: Hua et al. 2022 (Transformer Quality in Linear Time, FLASH, arXiv 2202.10447), section 3; softmax in the place of relu^2:
Su, kexue.fm/archives/8990 and 9052. Knows rings through attention alone. Letters: b batch, s tokens here, c width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.methods.scores import SquaredRelu

_PLAIN = Attention()


class GatedAttentionUnit(nn.Module):
    """x (b s c) of this rank -> (b s c), all ranks together.

    hidden: of U and V, 2 c in the paper. width: of queries and keys, 128 there. softmax: for relu^2, whose n is the whole length.
    attention: pattern, encoding and scores on top, such as a rotary encoding, or LogN over one with softmax.
    """

    def __init__(self, c: int, hidden: int, width: int = 128, *, softmax: bool = False, attention: Attention = _PLAIN) -> None:
        super().__init__()
        self.hidden, self.softmax, self.attention = hidden, softmax, attention
        self.inward, self.outward = nn.Linear(c, 2 * hidden + width, bias=False), nn.Linear(hidden, c, bias=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, *, ring: Ring, layout: Layout) -> Tensor:
        """layout: where the tokens of all ranks live."""
        u, v, z = silu(self.inward(x)).split((self.hidden, self.hidden, self.gamma.shape[1]), dim=-1)
        q, k = ((z * gamma + beta).unsqueeze(2) for gamma, beta in zip(self.gamma, self.beta, strict=True))
        found = ring_attention(q, k, v.unsqueeze(2), ring=ring, layout=layout, attention=self.asked(layout.length))
        assert isinstance(found, Tensor)
        out: Tensor = self.outward(u * found.squeeze(2))
        return out

    def asked(self, length: int) -> Attention:
        """The attention of a sequence of so many tokens."""
        if self.softmax:
            return self.attention
        return replace(self.attention, scores=(SquaredRelu(1 / length), *self.attention.scores), normaliser="sum")
