"""Sparsity: how few of many numbers matter. Each measures the last dim of x (... n) or of a distribution p (... n), which sums to 1.

`ringctx.core.rows` has those of attention's rows over a ring, without the matrix.
Source: Su, kexue.fm/archives/9595 and 9889; Hoyer 2004 (Non-negative matrix factorization with sparseness constraints), section 3.1.
"""

from __future__ import annotations

import math

from torch import Tensor


def zeros(x: Tensor, epsilon: float = 0.0) -> Tensor:
    """The share of entries of at most epsilon in size, 0 to 1."""
    return (x.abs() <= epsilon).to(x.dtype).mean(-1)


def spread(x: Tensor) -> Tensor:
    """S = E|x| / sqrt(E x^2) = l1 / (sqrt(n) l2): from 1/sqrt(n) for one entry alone to 1 for equal ones. Smaller is sparser."""
    return x.abs().mean(-1) / x.square().mean(-1).sqrt()


def hoyer(x: Tensor) -> Tensor:
    """(sqrt(n) - l1 / l2) / (sqrt(n) - 1): 0 for equal entries, 1 for one alone. n is 2 or more."""
    root = math.sqrt(x.shape[-1])
    return (root - x.abs().sum(-1) / x.square().sum(-1).sqrt()) / (root - 1)


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p, in nats: 0 to ln n."""
    return -(p * p.clamp(min=1e-300 if p.dtype.itemsize == 8 else 1e-38).log()).sum(-1)


def renyi2(p: Tensor) -> Tensor:
    """Renyi's entropy of order 2, -ln sum p^2, in nats."""
    return -p.square().sum(-1).log()


def effective_count(p: Tensor) -> Tensor:
    """1 / sum p^2: over how many entries p spreads, 1 to n."""
    return 1 / p.square().sum(-1)
