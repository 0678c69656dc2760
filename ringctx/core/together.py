"""Together: whole and causal tiles of one visit that a kernel computes in one call, over the rectangle that holds them all.

Knows tiles and kernels. Letters: b batch, s query tokens, n visiting keys, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ringctx.core.pattern import CAUSAL, FULL, PARTIAL
from ringctx.core.tiles import Tile
from ringctx.kernels.base import Kernel, TileScores
from ringctx.kernels.base import Tile as PlainTile

if TYPE_CHECKING:
    from ringctx.core.compute import Encoded


class Rectangle(NamedTuple):
    """queries, keys: first and end. tiles: as a kernel takes them, from the rectangle's corner on."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    tiles: tuple[PlainTile, ...]


@lru_cache(maxsize=256)
def joined(rows: tuple[Tile, ...], edge: int, num_queries: int, num_keys: int) -> tuple[Rectangle | None, tuple[Tile, ...]]:
    """The rectangle of those tiles whose borders are multiples of `edge` but at the tensors' ends, and the tiles that remain.

    No rectangle where such tiles are few, or so far apart that it would have twice the keys that they have.
    """
    fits = lambda a, b, size: a % edge == 0 and (b % edge == 0 or b == size)
    plain: list[Tile] = []
    rest: list[Tile] = []
    for tile in rows:
        verdict, a, b, c, d = tile
        (plain if verdict != PARTIAL and fits(a, b, num_queries) and fits(c, d, num_keys) else rest).append(tile)
    if len(plain) < 2:
        return None, rows
    x, y = min(t[1] for t in plain), min(t[3] for t in plain)
    queries, keys = (x, max(t[2] for t in plain)), (y, max(t[4] for t in plain))
    if queries[1] - x < edge or 2 * sum(t[4] - t[3] for t in plain) < keys[1] - y:
        return None, rows
    return Rectangle(queries, keys, tuple((verdict == CAUSAL, a - x, b - x, c - y, d - y) for verdict, a, b, c, d in plain)), tuple(rest)


@dataclass(frozen=True)
class Several:
    """A rectangle of tiles, and the kernel that computes them in one call."""

    kernel: Kernel
    at: Rectangle
    scores: TileScores

    def forward(self, encoded: Encoded, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of the rectangle's queries; a row that sees nothing of it has out 0 and lse -inf."""
        (a, b), (c, d) = self.at.queries, self.at.keys
        return self.kernel.forward(*encoded.rows((FULL, a, b, c, d)), v[:, c:d], self.scores, self.at.tiles)  # type: ignore[call-arg]

    def backward(
        self, encoded: Encoded, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of the rectangle. dout, out, lse, dlse: of all queries here."""
        (a, b), (c, d) = self.at.queries, self.at.keys
        tensors = (*encoded.rows((FULL, a, b, c, d)), v[:, c:d], out[:, a:b], lse[:, a:b], self.scores)
        return self.kernel.backward(dout[:, a:b], *tensors, None if dlse is None else dlse[:, a:b], self.at.tiles)  # type: ignore[call-arg]
