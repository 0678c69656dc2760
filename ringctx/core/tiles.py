"""Tiles: the parts of a (queries x keys) rectangle that a pattern leaves to compute, and the keys that anybody needs.

Knows patterns and indices. Knows nothing of ranks or kernels. A tile is given in local positions, not in indices.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise, product

import torch

from ringctx.core.layout import Ranges, count, indices_of, take
from ringctx.core.pattern import CAUSAL, EMPTY, FULL, PARTIAL, Pattern, Verdict

LEAF = 256  # a PARTIAL tile's longest side: larger wastes masked work, smaller pays dispatch (docs/results/recall)
FINE = 128  # tokens of a side that a leaf keeps where it is cut at a border of blocks or documents
STRIP = 4  # so many leaves may be one strip: one masked call is quicker than several and their merges

MOST_PARTS = 4  # of a block whose gradients leave part by part: of what is computed last a quarter is sent last

FEW_RANGES = 4  # of keys, judged one by one: the first and the latest, a border, a neighbour's

Tile = tuple[int, int, int, int, int]
"""(verdict, first query, end of queries, first key, end of keys), positions in local order; never EMPTY."""

Spans = tuple[tuple[int, int], ...]
"""Ascending (start, end) pairs of local positions."""


class Line:
    """Tokens in local order: what lies between two positions, and where best to divide it."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.starts = list(accumulate(map(len, ranges), initial=0))

    def hull(self, a: int, b: int) -> tuple[range, bool]:
        """A range that holds every index at positions a..b-1, and whether it is exactly those."""
        first, last = bisect_right(self.starts, a) - 1, bisect_right(self.starts, b - 1) - 1
        if first == last:
            return self.ranges[first][a - self.starts[first] : b - self.starts[first]], True
        parts = self.ranges[first : last + 1]
        return range(min(r[0] for r in parts), max(r[-1] for r in parts) + 1), False

    def parts(self) -> list[tuple[int, int]]:
        """Where to begin: all of it, or its ranges one by one where these are few, such as the first keys and the latest."""
        bounds = self.starts if len(self.ranges) <= FEW_RANGES else [0, self.starts[-1]]
        return [(a, b) for a, b in pairwise(bounds) if a < b]

    def divide(self, a: int, b: int, pattern: Pattern) -> int:
        """A position strictly between a and b: a border of ranges or documents if one is near the middle."""
        quarter = (b - a) // 4
        low, high, middle = a + quarter, b - quarter, (a + b) // 2
        at = bisect_right(self.starts, middle)
        borders = [s for s in self.starts[max(at - 1, 0) : at + 1] if low <= s <= high and a < s < b]
        if borders:
            return min(borders, key=lambda s: abs(s - middle))
        hull, exact = self.hull(a, b)
        index = pattern.cut(hull) if exact else None
        if index is not None:
            position = a + -(-(index - hull[0]) // hull.step)
            if low <= position <= high and a < position < b:
                return position
        return a + LEAF * max(1, round((b - a) / (2 * LEAF)))

    def borders(self, a: int, b: int, pattern: Pattern) -> list[int]:
        """a, perhaps the pattern's border that is nearest to the middle, if both parts keep FINE tokens, and b."""
        hull, exact = self.hull(a, b)
        index = pattern.cut(hull) if exact else None
        cut = a if index is None else a + -(-(index - hull[0]) // hull.step)
        return [a, cut, b] if a + FINE <= cut <= b - FINE else [a, b]


def tiles(pattern: Pattern, q: Ranges, k: Ranges) -> tuple[Tile, ...]:
    """Every tile of queries q times keys k that is not EMPTY, by rows; neighbours that are FULL are made one, and so are strips:
    tiles of the same few rows of which one is masked anyhow."""
    return _tiles(pattern, q, k)


@lru_cache(maxsize=4096)
def _tiles(pattern: Pattern, q: Ranges, k: Ranges) -> tuple[Tile, ...]:
    queries, keys = Line(q), Line(k)
    found: list[Tile] = []
    stack = [(0, count(q), c, d) for c, d in keys.parts()] if q else []
    while stack:
        a, b, c, d = stack.pop()
        q_hull, q_exact = queries.hull(a, b)
        k_hull, k_exact = keys.hull(c, d)
        verdict = pattern.judge(q_hull, k_hull)
        if verdict == CAUSAL and not (q_exact and k_exact):
            verdict = PARTIAL
        if verdict == EMPTY:
            continue
        if verdict != PARTIAL or max(b - a, d - c) <= LEAF:
            found += _resolved((int(verdict), a, b, c, d), pattern, queries, keys)
        elif b - a >= d - c:
            cut = queries.divide(a, b, pattern)
            stack += [(a, cut, c, d), (cut, b, c, d)]
        else:
            cut = keys.divide(c, d, pattern)
            stack += [(a, b, c, cut), (a, b, cut, d)]
    return _joined([_cropped(tile, pattern, queries, keys) for tile in _wide(found)])


def _resolved(tile: Tile, pattern: Pattern, queries: Line, keys: Line) -> list[Tile]:
    """A masked tile cut at the pattern's own borders, if that leaves more than half of it without a mask; else the tile."""
    verdict, a, b, c, d = tile
    if verdict != PARTIAL:
        return [tile]
    rows, columns = queries.borders(a, b, pattern), keys.borders(c, d, pattern)
    if len(rows) + len(columns) == 4:
        return [tile]
    parts, masked = [], 0
    for (w, x), (y, z) in product(pairwise(rows), pairwise(columns)):
        q_hull, k_hull = queries.hull(w, x), keys.hull(y, z)
        part = pattern.judge(q_hull[0], k_hull[0])
        if part == CAUSAL and not (q_hull[1] and k_hull[1]):
            part = PARTIAL
        masked += (x - w) * (z - y) * (part == PARTIAL)
        if part != EMPTY:
            parts.append((int(part), w, x, y, z))
    return parts if 2 * masked < (b - a) * (d - c) else [tile]


def _wide(found: list[Tile]) -> list[Tile]:
    """Tiles of equal rows that touch become one: FULL ones, and strips."""
    wide: list[Tile] = []
    for tile in sorted(found, key=lambda t: (t[1], t[2], t[3])):
        last = wide[-1] if wide else None
        touches = last is not None and last[1:3] == tile[1:3] and last[4] == tile[3]
        if last and touches and last[0] == tile[0] == FULL:
            wide[-1] = (*last[:4], tile[4])
        elif last and touches and _is_strip(last, tile):
            wide[-1] = (int(PARTIAL), *last[1:4], tile[4])
        else:
            wide.append(tile)
    return wide


def _is_strip(left: Tile, right: Tile) -> bool:
    """Whether two tiles of the same rows are better computed as one that is masked."""
    few = left[2] - left[1] <= LEAF and right[4] - left[3] <= STRIP * LEAF
    return few and PARTIAL in (left[0], right[0])


def _cropped(tile: Tile, pattern: Pattern, queries: Line, keys: Line) -> Tile:
    """A masked tile without the keys at its sides that no row sees, found in steps of an eighth of a leaf."""
    verdict, a, b, c, d = tile
    if verdict != PARTIAL:
        return tile
    rows, step = queries.hull(a, b)[0], max(LEAF // 8, 1)
    while d - c > step and pattern.judge(rows, keys.hull(c, c + step)[0]) == EMPTY:
        c += step
    while d - c > step and pattern.judge(rows, keys.hull(d - step, d)[0]) == EMPTY:
        d -= step
    return verdict, a, b, c, d


def _joined(wide: list[Tile]) -> tuple[Tile, ...]:
    """FULL tiles of equal columns that touch become one."""
    tall: list[Tile] = []
    for tile in sorted(wide, key=lambda t: (t[3], t[4], t[1])):
        last = tall[-1] if tall else None
        if last and last[0] == tile[0] == FULL and last[3:] == tile[3:] and last[2] == tile[1]:
            tall[-1] = (last[0], last[1], tile[2], *last[3:])
        else:
            tall.append(tile)
    return tuple(sorted(tall, key=lambda t: (t[1], t[3])))


def pieces(tile: Tile, side: int = 1024) -> list[Tile]:
    """The tile cut in squares of this side: a causal one in causal squares on its diagonal and full ones below."""
    verdict, a, b, c, d = tile
    cut = []
    for x in range(a, b, side):
        for y in range(c, d, side):
            if verdict != CAUSAL or y - c <= x - a:
                kind = FULL if verdict == CAUSAL and y - c < x - a else verdict
                cut.append((int(kind), x, min(x + side, b), y, min(y + side, d)))
    return cut


def cut_rows(tile: Tile, pairs: float) -> tuple[list[Tile], list[Tile]]:
    """The tile above and below a row, with about so many pairs above; whole leaves, and a masked tile stays whole."""
    verdict, a, b, c, d = tile
    rows = math.sqrt(2 * pairs) if verdict == CAUSAL else pairs / (d - c)
    at = a + LEAF * round(rows / LEAF) if verdict != PARTIAL and b - a > LEAF else b if 2 * rows >= b - a else a
    if at <= a or at >= b:
        return ([], [tile]) if at <= a else ([tile], [])
    if verdict == CAUSAL:
        e = c + at - a
        return [(verdict, a, at, c, e)], [(int(FULL), at, b, c, e), (verdict, at, b, e, d)]
    return [(verdict, a, at, c, d)], [(verdict, at, b, c, d)]


def cut_columns(rows: tuple[Tile, ...], c: int, d: int) -> tuple[Tile, ...]:
    """What tiles compute of the keys at positions c..d-1, counted from c."""
    found = []
    for verdict, a, b, y, z in rows:
        low, high = max(c, y), min(d, z)
        if low >= high:
            continue
        if verdict == CAUSAL:  # rows before the first key see none of them, rows after the last see all
            top, end = a + low - y, a + high - y
            found.append((verdict, top, end, low - c, high - c))
            if end < b:
                found.append((int(FULL), end, b, low - c, high - c))
        else:
            found.append((verdict, a, b, low - c, high - c))
    return tuple(found)


def parts(tokens: int, least: int) -> Spans:
    """Positions 0..tokens-1 in equal runs of about `least` tokens or more, MOST_PARTS of them at most, whole leaves but for the last."""
    number = max(1, min(MOST_PARTS, tokens // least))
    size = LEAF * max(1, -(-tokens // (LEAF * number)))
    return tuple((a, min(a + size, tokens)) for a in range(0, tokens, size))


def area(rows: tuple[Tile, ...]) -> int:
    """Query-key pairs to compute; a masked tile counts whole, since its kernel computes it whole."""
    return sum((b - a) * (b - a + 1) // 2 if verdict == CAUSAL else (b - a) * (d - c) for verdict, a, b, c, d in rows)


@lru_cache(maxsize=65536)
def needs(patterns: tuple[Pattern, ...], q: Ranges, k: Ranges) -> Spans:
    """Local positions of the keys k that at least one query of q sees under at least one of the patterns."""
    found = [(pattern, tile) for pattern in patterns for tile in _tiles(pattern, q, k)]
    whole = union([tuple((c, d) for _, (verdict, _, _, c, d) in found if verdict != PARTIAL)])
    rest = [(pattern, tile) for pattern, tile in found if tile[0] == PARTIAL and not _holds(whole, tile[3], tile[4])]
    if not rest:
        return whole
    low, high = min(tile[3] for _, tile in rest), max(tile[4] for _, tile in rest)
    needed = torch.zeros(high - low, dtype=torch.bool)
    for a, b in whole:
        needed[max(a - low, 0) : max(b - low, 0)] = True
    for pattern, (_, a, b, c, d) in rest:
        here = needed[c - low : d - low]
        if not here.all():
            here |= pattern.allows(indices_of(take(q, [(a, b)])), indices_of(take(k, [(c, d)]))).reshape(-1, d - c).any(0)
    return union([whole, tuple((a + low, b + low) for a, b in spans_of(needed))])


def _holds(spans: Spans, a: int, b: int) -> bool:
    """Whether one of the ascending spans holds all of a..b-1."""
    at = bisect_right(spans, (a, b)) - 1
    return any(c <= a and b <= d for c, d in spans[max(at, 0) : at + 2])


def forget_tiles() -> None:
    """Empty the caches of tiles and needs."""
    _tiles.cache_clear()
    needs.cache_clear()


def spans_of(needed: torch.Tensor) -> Spans:
    """The runs of True in a bool tensor (n,)."""
    padded = torch.nn.functional.pad(needed.to(torch.int8), (1, 1))
    steps = padded.diff()
    starts, ends = (steps == 1).nonzero().flatten().tolist(), (steps == -1).nonzero().flatten().tolist()
    return tuple(zip(starts, ends, strict=True))


def union(parts: list[Spans]) -> Spans:
    """Positions in any of the parts."""
    merged: list[tuple[int, int]] = []
    for a, b in sorted(span for part in parts for span in part):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return tuple(merged)


def width(spans: Spans) -> int:
    """How many positions the spans hold."""
    return sum(b - a for a, b in spans)


VERDICT_MARK = {EMPTY: "·", FULL: "█", CAUSAL: "◣", PARTIAL: "▒"}


def draw(rows: tuple[Tile, ...], num_queries: int, num_keys: int, cells: int = 32) -> str:
    """The tiles as text, one character a cell: █ all pairs, ◣ the causal half, ▒ masked, · nothing."""
    if not num_queries or not num_keys:
        return "(no tokens)"
    down, across = min(cells, num_queries), min(cells, num_keys)
    grid = [[Verdict.EMPTY] * across for _ in range(down)]
    for verdict, a, b, c, d in rows:
        for y in range(a * down // num_queries, -(-b * down // num_queries)):
            for x in range(c * across // num_keys, -(-d * across // num_keys)):
                grid[y][x] = _cell(Verdict(verdict), y / down * num_queries - a, x / across * num_keys - c, num_queries / down)
    return "\n".join("".join(VERDICT_MARK[cell] for cell in line) for line in grid)


def _cell(verdict: Verdict, row: float, column: float, side: float) -> Verdict:
    if verdict != CAUSAL:
        return verdict
    if abs(row - column) < side / 2:
        return CAUSAL
    return FULL if column < row else EMPTY
