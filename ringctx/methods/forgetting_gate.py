"""The forgetting gate: each token says, head by head, how much of everything before it still counts.

    logits_ij = q_i k_j / sqrt(d) + log f_(j+1) + ... + log f_i          f in (0, 1), a sigmoid of the token

Source: Lin et al. 2025 (Forgetting Transformer, arXiv 2503.02130), equation 4. A ring exchanges the gates, a number a token and head, and
what attention does. Letters: b batch, s queries here, n keys here, N keys of all ranks, h query heads, g key heads, d and e widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.attention import Attention, Encoding
from ringctx.core.gathered import whole
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.methods.scores import Params, require_heads
from ringctx.methods.sighted import attend, sight_at


@dataclass(frozen=True, eq=False)
class Faded:
    """sums[h, i] - sums[h, j], of running sums of log f (h N). Additive. Equal only to itself."""

    sums: Tensor

    def params(self) -> Params:
        """The running sums."""
        return (self.sums,)

    def bias(self, heads: Tensor, i: Tensor, j: Tensor, params: Params, dtype: torch.dtype | None = None) -> Tensor:
        """(h q k)."""
        require_heads(self, len(self.sums), heads)
        (sums,) = params
        return sums[heads[:, None], i][:, :, None] - sums[heads[:, None], j][:, None]

    def grads(self, dbias: Tensor, heads: Tensor, i: Tensor, j: Tensor, params: Params, into: Params | None = None) -> Params:
        """From dbias (b h q k): each query's row raises it, each key's column lowers it."""
        slope, at = dbias.sum(0), heads[:, None]
        (found,) = into or (torch.zeros_like(params[0], dtype=slope.dtype),)
        found.index_put_((at, i), slope.sum(2), accumulate=True)
        found.index_put_((at, j), -slope.sum(1), accumulate=True)
        return (found,)

    def __str__(self) -> str:
        return f"faded by gates {tuple(self.sums.shape)}"


def forgetting_attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, ring: Ring, layout: Layout | None, key_layout: Layout | None = None,
    encoding: Encoding | None = None,
) -> Tensor:  # fmt: skip
    """q (b s h d), k (b n g d), v (b n g e), gates (b n h) = log f of these keys' tokens -> (b s h e). All ranks together.

    layout: as in ring_attention; None while decoding, when every rank holds the newest tokens, the last of key_layout, without backward.
    """
    sight, found = sight_at("forgetting gate", q, k, v, ring=ring, layout=layout, key_layout=key_layout), list[Tensor]()
    for n in range(len(q)):
        every, _ = whole(ring, gates[n], sight.key_layout, "scores")
        attention = Attention(encoding=encoding, scores=(Faded(every.cumsum(0).T.contiguous()),))
        found.append(attend(sight, attention, *(x[n : n + 1] for x in (q, k, v))))
    return torch.cat(found)
