"""Labels: which do not count, and how tokens are followed by them."""

from __future__ import annotations

from torch import Tensor

IGNORED = -100
"""A label that does not count."""


def shifted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """ids and labels (b S) of tokens (b S+1): every token is followed by a label, the last by the one more that was read."""
    return tokens[:, :-1], tokens[:, 1:]
