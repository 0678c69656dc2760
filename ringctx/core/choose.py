"""Which transport: counted bytes and counted work, for the whole ring, before anything moves.

Knows plans and shapes. Sends nothing and measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ringctx.core.heads import shares
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.plan import World, tour
from ringctx.core.tiles import area, tiles, width

TRANSPORTS = ("rotate", "fetch", "gather", "heads", "pass_q")
BALANCE = 1.1  # a transport that loads its busiest rank more than this beyond the best is not chosen for its fewer bytes


@dataclass(frozen=True)
class Shape:
    """What the byte counts depend on: batch, heads, widths, bytes of an element and of an accumulated one, and backward."""

    b: int
    h: int
    g: int
    d: int
    e: int
    item: int
    wide: int
    backward: bool


@dataclass(frozen=True)
class Option:
    """One transport: bytes that all ranks send together, and the busiest rank's work over the mean."""

    transport: str
    bytes: int
    imbalance: float

    def __str__(self) -> str:
        return f"{self.transport}: {self.bytes:,} bytes sent by all ranks, busiest rank {self.imbalance:.2f} x the mean"


@dataclass(frozen=True)
class Choice:
    """The transport to use, and what it was compared with."""

    transport: str
    options: tuple[Option, ...]

    def explain(self) -> str:
        """One line for each transport, and the rule."""
        lines = [f"{'→' if o.transport == self.transport else ' '} {o}" for o in self.options]
        lines.append(
            f"  rule: fewest bytes among those within {BALANCE} x of the best balance; at a tie the first of {' '.join(TRANSPORTS)}"
        )
        return "\n".join(lines)


@lru_cache(maxsize=512)
def choose(
    patterns: tuple[Pattern, ...],
    layout: Layout,
    key_layout: Layout,
    shape: Shape,
    nodes: int = 1,
    others: tuple[str, ...] = ("heads", "pass_q"),
) -> Choice:
    """The transport with the fewest bytes among the balanced ones; others: those that move more than keys and may be taken."""
    world = World(patterns, layout, key_layout, nodes)
    options = [_rotate(world, shape), _fetch(world, shape), _gather(world, shape)]
    options += [count(world, shape) for name, count in (("heads", _heads), ("pass_q", _pass_q)) if name in others]
    limit = BALANCE * min(o.imbalance for o in options)
    best = min((o for o in options if o.imbalance <= limit), key=lambda o: o.bytes)
    return Choice(best.transport, tuple(options))


def _over_mean(loads: list[int]) -> float:
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def _pairs(world: World, rank: int, owner: int) -> int:
    return sum(area(tiles(p, world.layout.spans[rank], world.key_layout.spans[owner])) for p in world.patterns)


def _by_queries(world: World) -> float:
    ranks = range(world.size)
    return _over_mean([sum(_pairs(world, p, o) for o in ranks) for p in ranks])


def _keys_bytes(shape: Shape, tokens: int, grad_tokens: int) -> int:
    """Keys and values go out in forward and again in backward; dk and dv come back in the accumulation dtype."""
    values = shape.b * shape.g * (shape.d + shape.e)
    return values * (tokens * shape.item * (2 if shape.backward else 1) + grad_tokens * shape.wide * shape.backward)


def _rotate(world: World, shape: Shape) -> Option:
    tours = [tour(world, o) for o in range(world.size)]
    tokens = sum(width(t.carried) * t.last for t in tours)
    grads = sum(width(t.carried) * len(t.stops) for t in tours)
    return Option("rotate", _keys_bytes(shape, tokens, grads), _by_queries(world))


def _fetch(world: World, shape: Shape) -> Option:
    tokens = sum(width(world.needs(p, o)) for p in range(world.size) for o in range(world.size) if p != o)
    return Option("fetch", _keys_bytes(shape, tokens, tokens), _by_queries(world))


def _gather(world: World, shape: Shape) -> Option:
    counts = [world.key_layout.count(o) for o in range(world.size)]
    seen = [sum(bool(world.needs(p, o)) for p in range(world.size) if p != o) for o in range(world.size)]
    grads = sum(c * n for c, n in zip(counts, seen, strict=True))
    return Option("gather", _keys_bytes(shape, sum(counts) * (world.size - 1), grads), _by_queries(world))


def _heads(world: World, shape: Shape) -> Option:
    q_heads, k_heads = shares(shape.h, shape.g, world.size)
    ways = 2 if shape.backward else 1
    moved = 0
    for rank in range(world.size):
        s, n = world.layout.count(rank), world.key_layout.count(rank)
        for member in range(world.size):
            if member != rank:
                moved += s * len(q_heads[member]) * ((shape.d + shape.e) * shape.item * ways + shape.wide)
                moved += n * len(k_heads[member]) * (shape.d + shape.e) * shape.item * ways
    return Option("heads", shape.b * moved, _over_mean([len(x) for x in q_heads]))


def _pass_q(world: World, shape: Shape) -> Option:
    tokens = sum(world.layout.count(p) for p in range(world.size) for o in range(world.size) if p != o and world.needs(p, o))
    each = shape.d * shape.item + (shape.e + 1) * shape.wide
    if shape.backward:
        each += (shape.d + 2 * shape.e) * shape.item + (2 + shape.d) * shape.wide
    ranks = range(world.size)
    return Option("pass_q", shape.b * shape.h * tokens * each, _over_mean([sum(_pairs(world, p, o) for p in ranks) for o in ranks]))
