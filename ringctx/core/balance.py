"""A layout for any pattern: blocks of tokens dealt to ranks by what their queries cost.

Greedy: the costliest block first, to the rank with the least work so far that still has room (Graham 1969, LPT); then the busiest rank
exchanges blocks with others for as long as that helps.
"""

from __future__ import annotations

from functools import lru_cache

from ringctx.core.layout import Ranges
from ringctx.core.pattern import Pattern
from ringctx.core.tiles import area, tiles

BLOCKS_PER_RANK = 16
SMALLEST = 128  # tokens; shorter blocks lose more to small tiles than they win in balance


@lru_cache(maxsize=64)
def deal(length: int, size: int, pattern: Pattern) -> tuple[Ranges, ...]:
    """Per rank, the ranges it owns; ranks own equally many blocks, but for one."""
    num_blocks = max(1, min(BLOCKS_PER_RANK * size, length // SMALLEST)) if length >= SMALLEST * size else min(length, 2 * size)
    edges = [length * n // max(num_blocks, 1) for n in range(num_blocks + 1)]
    blocks = [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    cost = {b.start: area(tiles(pattern, (b,), (range(length),))) for b in blocks}
    owned: list[list[range]] = [[] for _ in range(size)]
    load = [0] * size
    room = -(-len(blocks) // size)
    for block in sorted(blocks, key=lambda b: (-cost[b.start], b.start)):
        rank = min((r for r in range(size) if len(owned[r]) < room), key=lambda r: (load[r], r))
        owned[rank].append(block)
        load[rank] += cost[block.start]
    while _exchange(owned, load, cost):
        pass
    return tuple(tuple(sorted(ranges, key=lambda r: r.start)) for ranges in owned)


def _exchange(owned: list[list[range]], load: list[int], cost: dict[int, int]) -> bool:
    """Exchange a block of the busiest rank for a cheaper one of another, whichever leaves both least busy; False if none helps."""
    busiest = max(range(len(load)), key=lambda r: (load[r], -r))
    best = load[busiest], -1, -1, -1
    for other, blocks in enumerate(owned):
        for x, mine in enumerate(owned[busiest]):
            for y, theirs in enumerate(blocks):
                moved = cost[mine.start] - cost[theirs.start]
                best = min(best, (max(load[busiest] - moved, load[other] + moved), other, x, y)) if moved > 0 else best
    most, other, x, y = best
    if most >= load[busiest]:
        return False
    moved = cost[owned[busiest][x].start] - cost[owned[other][y].start]
    owned[busiest][x], owned[other][y] = owned[other][y], owned[busiest][x]
    load[busiest] -= moved
    load[other] += moved
    return True
