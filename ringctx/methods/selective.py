"""Selective Attention: tokens mark earlier tokens as no longer needed, without a parameter.

What is added to the definition, where the paper is silent: the driving logit is head 0's, of key head 0 where key heads are shared;
it is taken as attention itself has it, after scale, elementwise and additive scores and the mask, before anything is subtracted.
In packed documents each document has a first token of its own, which is never marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ringctx.errors import ConfigError


@dataclass(frozen=True)
class Selective:
    """Attention(carry=Selective()): softmax(L - F) v with F_ij the sum over r, j < r < i, of relu(L0_rj), L0 head 0's logits.

    A first token (of the sequence, of each document), the token itself and the one before it are never marked: F is 0 there.
    tau: what F counts as forgotten when the memory is measured (`ringctx.core.entry.Carried`).
    Source: Leviathan, Kalman & Matias 2024, arXiv 2410.02703. Raises ConfigError for a tau that is not positive.
    """

    tau: float = 1.0
    rectifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ConfigError(f"tau is the score at which a token counts as forgotten, more than 0; got {self.tau}. The paper's is 1.")

    def gives(self, logits: Tensor) -> Tensor:
        """What a query's logits give to their keys, in their dtype."""
        return torch.relu(logits)

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of `gives`."""
        return (logits > 0).to(logits.dtype)
