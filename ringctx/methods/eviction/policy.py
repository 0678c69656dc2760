"""CachePolicy: one method with one meaning, `score`: higher is kept.

Knows what one rank holds of one layer. Knows nothing of stores, of the model or of when it is asked.
Letters: b batch, f key heads of one part, n slots on this rank, N slots on all ranks, d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ringctx.core.header import share
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError

FAR = torch.iinfo(torch.int64).max
"""The index that an empty slot counts as, so that it comes last."""


@dataclass(frozen=True)
class Held:
    """What this rank holds of some key heads of a layer when a policy is asked.

    heads: the f key heads' numbers in the model. keys (b n f d), before rotation, values (b n f e); indices (b f n), -1 where a
    slot is empty. mass (b f n): what the voters gave each key, averaged over the query heads that share it; 0 without voters.
    carry (b n): what keys carry, the same for all heads; None where they carry nothing.
    length: tokens of the sequence so far, evicted ones included. num_voters: of the newest of them voted since the last eviction.
    """

    ring: Ring
    layer: int
    num_layers: int
    length: int
    heads: tuple[int, ...]
    keys: Tensor
    values: Tensor
    indices: Tensor
    mass: Tensor
    num_voters: int = 0
    carry: Tensor | None = None

    def everywhere(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b f n) of all ranks, in the order of indices: x and indices (b f N), 0 and FAR where slots are empty.

        All ranks must call it together.
        """
        x, indices = x.masked_fill(self.indices < 0, 0.0), self.indices.masked_fill(self.indices < 0, FAR)
        found = gather(self.ring, torch.stack((x.double(), indices.view(torch.float64))))
        x, indices = found[0].to(x.dtype), found[1].contiguous().view(torch.int64)
        indices, order = indices.sort(-1)
        return x.gather(-1, order), indices


class CachePolicy:
    """Which keys a layer keeps. Subclasses say how many, and score them.

    at_steps: asked again after each decoded token, not only after chunks and prompts.
    accumulates: the voters' mass stays with the keys that are kept; else it begins anew after each eviction.
    """

    at_steps: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        """Keys that each key head of this layer keeps, on all ranks together, after `length` tokens."""
        raise NotImplementedError

    def score(self, held: Held) -> Tensor:
        """(b f n): higher is kept; +inf is kept and -inf dropped whatever the budget, NaN is the lowest else. Empty slots: anything."""
        raise NotImplementedError

    def voters(self, begin: int, end: int) -> range:
        """Of the queries begin..end-1, the next to be evicted after, those whose softmax is summed for each key: `Held.mass`."""
        return range(end, end)


def gather(ring: Ring, x: Tensor) -> Tensor:
    """x (... n) of all ranks, n differing, one after the other in rank order (... N). All ranks must call it together."""
    if ring.size == 1:
        return x
    sizes = [int(size) for size in share(ring, torch.tensor([x.shape[-1]]), "scores")]
    return torch.cat(share(ring, x.movedim(-1, 0), "scores", sizes)).movedim(0, -1)


def at_least(least: int, policy: object, **numbers: int) -> None:
    """Raise ConfigError for the first number below `least`."""
    for name, number in numbers.items():
        if number < least:
            raise ConfigError(f"{type(policy).__name__} was given {name} {number}; it must be at least {least}.")
