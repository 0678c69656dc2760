"""Plan: who computes and who sends what, decided before any key moves.

Knows layouts, patterns and one rank. Knows nothing of tensors or processes. Every rank makes its own plan from the same
layouts and patterns, so all plans fit together without a word exchanged.

Transports of keys (`rotate`, `fetch`, `gather`) differ only in which block arrives at which hop, and where the gradient of
a visiting block goes next; the loop that follows a plan knows neither. Tiles are planned against what really arrives.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

from ringctx.core.layout import Layout, Ranges, count, take
from ringctx.core.pattern import Pattern
from ringctx.core.tiles import Spans, Tile, area, cut_columns, draw, needs, parts, tiles, union, width


@dataclass(frozen=True)
class Parcel:
    """Some tokens of one owner, on the way to or from a peer."""

    peer: int
    owner: int
    spans: Spans

    def part(self, c: int, d: int) -> Parcel:
        """The tokens c..d-1 of these alone."""
        return replace(self, spans=_within(self.spans, c, d))


@dataclass(frozen=True)
class Visit:
    """Keys of one owner, present on this rank: which of them, and the tiles of each head group that they take part in."""

    owner: int
    ranges: Ranges
    spans: Spans
    tiles: tuple[tuple[Tile, ...], ...]
    grads_from: int | None = None
    grads_to: int | None = None

    @property
    def area(self) -> int:
        """Query-key pairs to compute, summed over head groups."""
        return sum(map(area, self.tiles))

    def part(self, c: int, d: int) -> Visit:
        """The keys c..d-1 of these alone."""
        if (c, d) == (0, width(self.spans)):
            return self
        tiles = tuple(cut_columns(rows, c, d) for rows in self.tiles)
        return replace(self, ranges=take(self.ranges, [(c, d)]), spans=_within(self.spans, c, d), tiles=tiles)


@dataclass(frozen=True)
class Hop:
    """What arrives, what leaves, and which gradients move once the visits of this hop are computed in backward."""

    receive: tuple[Parcel, ...] = ()
    send: tuple[Parcel, ...] = ()
    visits: tuple[Visit, ...] = ()
    grads_receive: tuple[Parcel, ...] = ()


@lru_cache(maxsize=512)
def steps_of(hop: Hop, least: int) -> tuple[Hop, ...]:
    """Backward of a hop's visits, part by part of `least` tokens or more: while one is computed the gradients of the one before travel.

    Whoever sends and whoever receives a block's gradients cut them alike.
    """
    cut = lambda some: [some.part(c, d) for c, d in parts(width(some.spans), least)]
    visits, grads = zip_longest(*map(cut, hop.visits)), zip_longest(*map(cut, hop.grads_receive))
    both = zip_longest(visits, grads, fillvalue=())
    return tuple(Hop(visits=tuple(filter(None, some)), grads_receive=tuple(filter(None, came))) for some, came in both)


@dataclass(frozen=True)
class Plan:
    """What one rank computes and sends.

    held: most tokens of keys that are here at once besides this rank's own.
    """

    rank: int
    transport: str
    num_queries: int
    num_keys: int
    home: Visit
    hops: tuple[Hop, ...]

    @property
    def all_tiles(self) -> tuple[tuple[tuple[Tile, ...], ...], ...]:
        """The tiles of home and of every visit, each by head group."""
        return (self.home.tiles, *(v.tiles for hop in self.hops for v in hop.visits))

    @property
    def tokens_received(self) -> int:
        """Tokens whose key and value arrive here in forward (and again in backward)."""
        return sum(width(p.spans) for hop in self.hops for p in hop.receive)

    @property
    def tokens_sent(self) -> int:
        """Tokens whose key and value leave from here in forward (and again in backward)."""
        return sum(width(p.spans) for hop in self.hops for p in hop.send)

    @property
    def grad_tokens_received(self) -> int:
        """Tokens whose dk and dv arrive here in backward."""
        return sum(width(p.spans) for hop in self.hops for p in hop.grads_receive)

    @property
    def grad_tokens_sent(self) -> int:
        """Tokens whose dk and dv leave from here in backward."""
        return sum(width(v.spans) for hop in self.hops for v in hop.visits if v.grads_to is not None)

    @property
    def held(self) -> int:
        """Most visiting tokens here at once: those being computed and those arriving meanwhile."""
        sizes = [0, *(sum(width(p.spans) for p in hop.receive) for hop in self.hops), 0]
        return max(a + b for a, b in zip(sizes, sizes[1:], strict=False))

    @property
    def cost(self) -> int:
        """Query-key pairs this rank computes, summed over head groups."""
        return self.home.area + sum(v.area for hop in self.hops for v in hop.visits)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with anything in the plan."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def draw(self, cells: int = 32) -> str:
        """This rank's tiles, owner by owner, as text."""
        parts = [f"rank {self.rank}, {self.transport}: {self.cost:,} pairs"]
        for visit in (self.home, *(v for hop in self.hops for v in hop.visits)):
            parts.append(f"keys of rank {visit.owner} ({width(visit.spans)} tokens)")
            parts += [draw(rows, self.num_queries, width(visit.spans), cells) for rows in visit.tiles]
        return "\n".join(parts)

    def explain(self) -> str:
        """One line a hop: what arrives, what leaves, what is computed."""
        lines = [
            f"rank {self.rank}, {self.transport}: {len(self.hops)} hops, {self.cost:,} query-key pairs; receives "
            f"{self.tokens_received} and sends {self.tokens_sent} tokens of keys forward, "
            f"{self.grad_tokens_received} and {self.grad_tokens_sent} of gradients backward; "
            f"holds at most {self.held} visiting tokens",
            f"  home: {sum(map(len, self.home.tiles))} tiles, {self.home.area:,} pairs",
        ]
        for number, hop in enumerate(self.hops, 1):
            comes = ", ".join(f"{width(p.spans)} of rank {p.owner} from rank {p.peer}" for p in hop.receive) or "nothing"
            goes = ", ".join(f"{width(p.spans)} of rank {p.owner} to rank {p.peer}" for p in hop.send) or "nothing"
            work = ", ".join(f"{sum(map(len, v.tiles))} tiles with {v.area:,} pairs" for v in hop.visits) or "nothing"
            lines.append(f"  hop {number}: receives {comes}; sends {goes}; computes {work}")
        return "\n".join(lines)


def _within(spans: Spans, c: int, d: int) -> Spans:
    """Of the positions in the spans the c-th to the one before the d-th."""
    found, at = [], 0
    for a, b in spans:
        low, high = a + max(c - at, 0), min(b, a + d - at)
        at += b - a
        if low < high:
            found.append((low, high))
    return tuple(found)


@lru_cache(maxsize=512)
def make_plan(patterns: tuple[Pattern, ...], layout: Layout, key_layout: Layout, rank: int, transport: str, nodes: int = 1) -> Plan:
    """The plan of one rank; patterns has one entry for each group of heads, without heads of its own."""
    build = {"rotate": _rotate, "fetch": _fetch, "gather": _gather}[transport]
    world = World(patterns, layout, key_layout, nodes)
    spans = ((0, key_layout.count(rank)),) if key_layout.count(rank) else ()
    hops = build(world, rank)
    while hops and hops[-1] == Hop():
        hops.pop()
    return Plan(rank, transport, layout.count(rank), key_layout.count(rank), world.visit(rank, rank, spans), tuple(hops))


@dataclass(frozen=True)
class World:
    """What every rank knows about all ranks."""

    patterns: tuple[Pattern, ...]
    layout: Layout
    key_layout: Layout
    nodes: int = 1

    @property
    def size(self) -> int:
        return self.layout.size

    def needs(self, rank: int, owner: int) -> Spans:
        """Which of the owner's keys this rank's queries see."""
        return needs(self.patterns, self.layout.spans[rank], self.key_layout.spans[owner])

    def visit(self, rank: int, owner: int, spans: Spans, grads_from: int | None = None, grads_to: int | None = None) -> Visit:
        """The owner's keys at these positions, visiting this rank."""
        ranges = take(self.key_layout.spans[owner], spans)
        rows = tuple(tiles(pattern, self.layout.spans[rank], ranges) for pattern in self.patterns)
        return Visit(owner, ranges, spans, rows, grads_from, grads_to)


MOST_RUNS = 1024


@lru_cache(maxsize=256)
def wanted(patterns: tuple[Pattern, ...], layout: Layout, key_layout: Layout) -> tuple[Layout, tuple[Spans, ...]]:
    """The keys that at least one query of the layout sees under one of the patterns: where they live, and each owner's positions.

    Where an owner's would be more than MOST_RUNS runs, all of its keys: to cut them out would cost more than to carry them along.
    """
    world, ranks = World(patterns, layout, key_layout), range(layout.size)
    spans = tuple(union([world.needs(rank, owner) for rank in ranks]) for owner in ranks)
    spans = tuple(some if len(some) <= MOST_RUNS else ((0, key_layout.count(owner)),) for owner, some in enumerate(spans))
    return Layout(tuple(map(take, key_layout.spans, spans))), spans


def path(rank: int, size: int, nodes: int) -> tuple[tuple[int, int, int], ...]:
    """For hops 1..size-1 of a rotation: (whose keys arrive, from which rank, to which rank the held ones go).

    One circle: from the left neighbour to the right. On several nodes a double ring: the circle inside the node runs
    round, then everything moves one node on, so only one hop in (ranks per node) crosses the slow links.
    """
    inner = size // nodes
    owner_node, owner_at = divmod(rank, inner)
    hops = []
    for hop in range(1, size):
        over = _crosses(hop, inner)
        owner_node, owner_at = (owner_node - over) % nodes, (owner_at - 1 + over) % inner
        hops.append((owner_node * inner + owner_at, _beside(rank, hop, -1, size, nodes), _beside(rank, hop, 1, size, nodes)))
    return tuple(hops)


def _crosses(hop: int, inner: int) -> int:
    """1 for a hop to the next node, else 0."""
    return int(hop % inner == 0)


def _beside(rank: int, hop: int, way: int, size: int, nodes: int) -> int:
    """The rank to which (way 1) or from which (way -1) keys move at a hop."""
    inner = size // nodes
    node, at = divmod(rank, inner)
    over = _crosses(hop, inner)
    return (node + way * over) % nodes * inner + (at + way * (1 - over)) % inner


@lru_cache(maxsize=1024)
def _itinerary(owner: int, size: int, nodes: int) -> tuple[int, ...]:
    """The ranks that the owner's keys visit, hop by hop."""
    ranks, at = [], owner
    for hop in range(1, size):
        at = _beside(at, hop, 1, size, nodes)
        ranks.append(at)
    return tuple(ranks)


@dataclass(frozen=True)
class Tour:
    """One owner's keys in a rotation: the rank that needs some at each hop that has one; which keys go; the last hop they make."""

    stop_at: dict[int, int]
    carried: Spans
    last: int

    @property
    def stops(self) -> tuple[int, ...]:
        """The ranks that need some, in order."""
        return tuple(self.stop_at.values())

    def onward(self, hop: int, owner: int) -> int:
        """Where the gradients of a hop's stop go: to the stop of the next hop, or home if there is none, so that none wait for long."""
        return self.stop_at.get(hop + 1, owner)


@lru_cache(maxsize=2048)
def tour(world: World, owner: int) -> Tour:
    """Where the owner's keys go, and no farther."""
    stop_at = {hop: p for hop, p in enumerate(_itinerary(owner, world.size, world.nodes), 1) if world.needs(p, owner)}
    return Tour(stop_at, union([world.needs(p, owner) for p in stop_at.values()]), max(stop_at, default=0))


def _rotate(world: World, rank: int) -> list[Hop]:
    """Pass-KV ring (Liu et al. 2023): keys go round until nobody later needs them; gradients follow, rank by rank, then home."""
    tours = [tour(world, o) for o in range(world.size)]
    ways = path(rank, world.size, world.nodes)

    hops, holding = [], rank
    for number, (owner, comes, goes) in enumerate(ways, 1):
        of = tours[owner]
        receive = (Parcel(comes, owner, of.carried),) if number <= of.last else ()
        send = (Parcel(goes, holding, tours[holding].carried),) if number <= tours[holding].last else ()
        visits: tuple[Visit, ...] = ()
        if of.stop_at.get(number) == rank:
            visits = (world.visit(rank, owner, of.carried, of.stop_at.get(number - 1), of.onward(number, owner)),)
        coming = {rank: tours[rank].stop_at.get(number)} if tours[rank].onward(number, rank) == rank else {}  # from their last stop
        after = ways[number][0] if number < len(ways) else rank  # whose keys come next, and with them their gradients so far
        if tours[after].stop_at.get(number + 1) == rank:
            coming[after] = tours[after].stop_at.get(number)
        grads = tuple(Parcel(p, o, tours[o].carried) for o, p in sorted(coming.items()) if p is not None)
        hops.append(Hop(receive, send, visits, grads))
        holding = owner
    return hops


def _fetch(world: World, rank: int) -> list[Hop]:
    """Each rank gets exactly the keys that its queries see, straight from their owners, the nearest rank on the left first."""
    hops = []
    for number in range(1, world.size):
        left, right = (rank - number) % world.size, (rank + number) % world.size
        wanted, lent = world.needs(rank, left), world.needs(right, rank)
        receive = (Parcel(left, left, wanted),) if wanted else ()
        send = (Parcel(right, rank, lent),) if lent else ()
        visits = (world.visit(rank, left, wanted, None, left),) if wanted else ()
        hops.append(Hop(receive, send, visits, tuple(Parcel(p.peer, rank, p.spans) for p in send)))
    return hops


def _gather(world: World, rank: int) -> list[Hop]:
    """Everybody gets every key in a single hop; holds the whole sequence, for the sake of one wait."""
    others = [(rank + n) % world.size for n in range(1, world.size)]
    whole = lambda o: ((0, count(world.key_layout.spans[o])),) if world.key_layout.spans[o] else ()
    receive = tuple(Parcel(o, o, whole(o)) for o in others if whole(o))
    send = tuple(Parcel(o, rank, whole(rank)) for o in others if whole(rank))
    visits = tuple(world.visit(rank, o, whole(o), None, o) for o in others if world.needs(rank, o))
    grads = tuple(Parcel(o, rank, whole(rank)) for o in others if world.needs(o, rank))
    return [Hop(receive, send, visits, grads)] if others else []
