"""Batches: labels are shifted on the whole sequence, then everything is sharded.

Knows layouts. Knows nothing of models. Letters: b sequences, S tokens of each, s of them on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ringctx.core.layout import Layout

CPU = torch.device("cpu")
IGNORED = -100
"""A label that does not count."""


@dataclass(frozen=True)
class Batch:
    """This rank's share: ids, labels (b s) and positions (1 s); count: labels of all ranks that are not IGNORED.

    A rank without tokens has one of any kind without a label, because transformers takes no empty input.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    layout: Layout
    count: int

    @classmethod
    def of(cls, ids: Tensor, labels: Tensor, layout: Layout, rank: int, device: torch.device = CPU) -> Self:
        """ids and labels (b S) of whole sequences, labels shifted already: labels[:, i] is what follows ids[:, i], or IGNORED."""
        count = int((labels != IGNORED).sum())
        own = layout.indices(rank)
        ids, labels, own = (
            (ids[:, own], labels[:, own], own) if len(own) else (ids[:, :1], torch.full_like(ids[:, :1], IGNORED), torch.zeros(1).long())
        )
        return cls(ids.to(device), labels.to(device), own[None].to(device), layout, count)


def shifted(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """ids and labels (b S) of tokens (b S+1): every token is followed by a label, the last by the one more that was read."""
    return tokens[:, :-1], tokens[:, 1:]
