"""Top-k by any score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ringctx.errors import ConfigError
from ringctx.methods.eviction.policy import CachePolicy, Held, at_least

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(keys (b n f d) before rotation, values (b n f e), indices (b f n)) -> (b f n); higher is kept."""


@dataclass(frozen=True, eq=False)
class TopK(CachePolicy):
    """Keep the `keys` best of each key head by a function of keys, values and indices, or by a table of scores.

    by: a Score, or a tensor by index of shape (S), (g S) or (b g S). Raises ConfigError when a table does not reach a key.
    """

    keys: int
    by: Score | Tensor

    def __post_init__(self) -> None:
        at_least(1, self, keys=self.keys)
        if isinstance(self.by, Tensor) and self.by.dim() not in (1, 2, 3):
            raise ConfigError(f"TopK takes a table (S), (g S) or (b g S), and this is {tuple(self.by.shape)}; give each index a score.")

    def budget(self, layer: int, num_layers: int, length: int) -> int:
        return self.keys

    def score(self, held: Held) -> Tensor:
        if not isinstance(self.by, Tensor):
            return self.by(held.keys, held.values, held.indices)
        table = self.by.to(held.indices.device)[(None,) * (3 - self.by.dim())]
        last = max(held.heads)
        if table.shape[2] < held.length or 1 < table.shape[1] <= last or table.shape[0] not in (1, len(held.indices)):
            raise ConfigError(
                f"TopK's table {tuple(self.by.shape)} does not reach {held.length} tokens of key head {last} in a batch of "
                f"{len(held.indices)}; give it (S), (g S) or (b g S) of the whole sequence."
            )
        table = table[:, list(held.heads)] if table.shape[1] > 1 else table
        return table.expand(*held.indices.shape[:2], -1).gather(-1, held.indices.clamp(min=0))
