"""Dropout that is the same on every layout: a counter-based generator on (batch, head, i, j).

Knows indices of the whole sequence. Knows nothing of ranks or tiles: what a query-key pair gets depends on its own numbers alone.
Letters: b batch, h query heads, q and k the tile's queries and keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringctx.errors import ConfigError

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 16  # counters at a time: a few temporaries of 512 KiB each

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four counter words and two key words, 32 bits each in int64, to four random words.

    The product of two 32-bit words wraps in int64, and the bits are right all the same.
    """
    a, b, c, d = counter
    key_a, key_b = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (second >> 32 & _WORD) ^ b ^ key_a, (first >> 32 & _WORD) ^ d ^ key_b
        b, d = second & _WORD, first & _WORD
        key_a, key_b = key_a + _WEYL[0] & _WORD, key_b + _WEYL[1] & _WORD
    return a, b, c, d


def keep(p: float, seed: int, batch: Tensor, heads: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Dropout's multiplier of each probability, 0 or 1/(1-p): float32 (b, h, q, k).

    batch (b,), heads (h,), i (q,) and j (k,) are numbers in the whole batch, model and sequence, each below 2^32; the
    multiplier of a pair is a function of its own four numbers and the seed (64 bits). Raises ConfigError unless 0 <= p < 1.
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"Dropout was asked with probability {p}; it is at least 0 and less than 1.")
    shape = (len(batch), len(heads), len(i), len(j))
    if p == 0.0 or 0 in shape:
        return torch.ones(shape, dtype=torch.float32, device=j.device)
    key = (seed & _WORD, seed >> 32 & _WORD)
    quads, place = torch.unique(j.long() // 4, return_inverse=True)
    column = place * 4 + j.long() % 4
    rows = max(1, _CHUNK // len(quads))
    least = math.ceil(p * 2**32)
    result = torch.empty(shape, dtype=torch.float32, device=j.device)
    for nb, number in enumerate(batch.tolist()):
        for nh, head in enumerate(heads.tolist()):
            for start in range(0, len(i), rows):
                part = i[start : start + rows].long()
                words = philox(_counter(quads, part, head, number), key)
                kept = torch.stack(words, -1).flatten(1).index_select(1, column) >= least
                result[nb, nh, start : start + rows] = kept
    return result.mul_(1.0 / (1.0 - p))


def _counter(quads: Tensor, i: Tensor, head: int, batch: int) -> Words:
    """The counter words (j // 4, i, head, batch), each (q, quads)."""
    first, second = torch.broadcast_tensors(quads, i[:, None])
    return first, second, torch.full_like(first, head), torch.full_like(first, batch)
