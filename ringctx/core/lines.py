"""Lines: whole columns of keys, and whole diagonals, that queries see; what selectors draw.

Knows indices. Not a function of `ringctx.patterns`: nobody types hundreds of offsets by hand.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ringctx.core.listed import hash_once
from ringctx.core.pattern import EMPTY, FULL, PARTIAL, Pattern, Verdict
from ringctx.core.rules import some
from ringctx.errors import ConfigError


@dataclass(frozen=True)
class Lines(Pattern):
    """j is one of the columns, or some query of i's tile of `tile` queries stands one of the offsets after j.

    With tile 1 that is i - j in offsets. A larger tile widens each diagonal to a staircase of squares, which kernels like better:
    i sees j = i' - offset for every i' with i' // tile = i // tile (MInference, arXiv 2407.02490, its slash blocks).
    columns, offsets: ascending and different.
    """

    columns: tuple[int, ...]
    offsets: tuple[int, ...]
    tile: int = 1
    __hash__ = hash_once

    def __post_init__(self) -> None:
        for numbers in (self.columns, self.offsets):
            if list(numbers) != sorted(set(numbers)):
                raise ConfigError(f"Lines takes ascending numbers, each once, and was given {some(numbers)}; sort them.")
        if self.tile < 1:
            raise ConfigError(f"Lines was given a tile of {self.tile}; it counts queries: write 1 or more.")

    @cached_property
    def _runs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First and last of each run of distances from a tile's first query to the keys that it sees."""
        firsts: list[int] = []
        lasts: list[int] = []
        for offset in self.offsets:
            if lasts and offset - self.tile < lasts[-1] + 1:
                lasts[-1] = offset
            else:
                firsts.append(offset - self.tile + 1)
                lasts.append(offset)
        return tuple(firsts), tuple(lasts)

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        firsts, lasts = (torch.tensor(x, dtype=torch.int64, device=i.device) for x in self._runs)
        distance = (i // self.tile * self.tile)[:, None] - j
        run = torch.searchsorted(firsts, distance, right=True) - 1
        on_a_diagonal = (run >= 0) & (distance <= lasts[run.clamp(min=0)]) if len(firsts) else torch.zeros_like(distance, dtype=torch.bool)
        return on_a_diagonal | torch.isin(j, torch.tensor(self.columns, dtype=torch.int64, device=i.device))

    def judge(self, q: range, k: range) -> Verdict:
        nearest, farthest = q[0] // self.tile * self.tile - k[-1], q[-1] // self.tile * self.tile - k[0]
        firsts, lasts = self._runs
        run = bisect_right(firsts, nearest) - 1
        if run >= 0 and farthest <= lasts[run]:
            return FULL
        columns = self.columns[bisect_left(self.columns, k[0]) : bisect_right(self.columns, k[-1])]
        if len(columns) >= len(k) and (k.step == 1 or all(j in columns for j in k)):
            return FULL
        next_run = bisect_left(lasts, nearest)  # the first run that does not end before the nearest distance
        reached = next_run < len(firsts) and firsts[next_run] <= farthest
        return PARTIAL if reached or any(j in k for j in columns) else EMPTY

    def __str__(self) -> str:
        staircase = f" in tiles of {self.tile}" if self.tile > 1 else ""
        return f"lines({len(self.columns)} columns, {len(self.offsets)} diagonals{staircase})"
