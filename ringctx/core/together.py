"""Together: tiles of one visit that a kernel computes in one call, over the rectangle that holds them all: whole, causal, a window's.

Knows tiles and kernels. Letters: b batch, s query tokens, n visiting keys, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ringctx.core.layout import Ranges, count
from ringctx.core.pattern import CAUSAL, FAR, FULL, PARTIAL, Pattern
from ringctx.core.tiles import Line, Tile
from ringctx.kernels.base import Kernel, TileScores
from ringctx.kernels.base import Tile as Banded

if TYPE_CHECKING:
    from ringctx.core.compute import Encoded


class Rectangle(NamedTuple):
    """queries, keys: first and end. tiles: as a kernel of this edge takes them, from the rectangle's corner on."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    tiles: tuple[Banded, ...]
    edge: int

    @property
    def pairs(self) -> int:
        """Query-key pairs that the kernel computes, which takes as many queries at once as its edge."""
        return sum(
            min(self.edge, b - i) * max(0, min(d, i + self.edge + high) - max(c, i + low))
            for low, high, a, b, c, d in self.tiles
            for i in range(a, b, self.edge)
        )


@lru_cache(maxsize=256)
def joined(pattern: Pattern, queries: Ranges, keys: Ranges, rows: tuple[Tile, ...], edge: int) -> tuple[Rectangle | None, tuple[Tile, ...]]:
    """The rectangle of those tiles that a kernel of this edge takes, and the tiles that remain: those it would cut, and masked ones that
    are no band.

    No rectangle where such tiles are few, or so far apart that it would have twice the keys that they have.
    """
    fits = lambda a, b, size: a % edge == 0 and (b % edge == 0 or b == size)
    sizes, lines = (count(queries), count(keys)), (Line(queries), Line(keys))
    found: list[tuple[Tile, tuple[int, int]]] = []
    rest: list[Tile] = []
    for tile in rows:
        _, a, b, c, d = tile
        band = _band(pattern, tile, *lines, 2 * edge - 2) if fits(a, b, sizes[0]) and fits(c, d, sizes[1]) else None
        if band is None:
            rest.append(tile)
        else:
            found.append((tile, band))
    some = [tile for tile, _ in found]
    if len(some) < 2 and not any(verdict == PARTIAL for verdict, *_ in some):
        return None, rows
    x, y = min(t[1] for t in some), min(t[3] for t in some)
    ends = max(t[2] for t in some), max(t[4] for t in some)
    if ends[0] - x < edge or 2 * sum(t[4] - t[3] for t in some) < ends[1] - y:
        return None, rows
    moved = ((*(_moved(bound, x - y) for bound in band), a - x, b - x, c - y, d - y) for (_, a, b, c, d), band in found)
    return Rectangle((x, ends[0]), (y, ends[1]), tuple(moved), edge), tuple(rest)  # type: ignore[arg-type]


def _band(pattern: Pattern, tile: Tile, queries: Line, keys: Line, least: int) -> tuple[int, int] | None:
    """low and high, where the query at position i sees of the tile exactly the keys at positions j with low <= j - i <= high, least or more
    apart; else None."""
    verdict, a, b, c, d = tile
    if verdict != PARTIAL:
        return -FAR, c - a if verdict == CAUSAL else FAR
    (q, q_exact), (k, k_exact) = queries.hull(a, b), keys.hull(c, d)
    band = pattern.band(q, k) if q_exact and k_exact and q.step == k.step else None
    if band is None:
        return None
    ahead, apart = k[0] - q[0], c - a
    low = -FAR if band[0] == -FAR else apart - (ahead - band[0]) // q.step
    high = FAR if band[1] == FAR else apart + (band[1] - ahead) // q.step
    return (low, high) if high - low >= least else None


def _moved(bound: int, by: int) -> int:
    """A band's bound, unless there is none."""
    return bound + by if abs(bound) < FAR else bound


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
