"""Predict: what reading a sequence costs on so many ranks, for each layout and transport, and which is the quickest.

Knows plans, shapes and machines. Sends nothing. Bytes and hops are those of the plans, so exact; seconds are simulated from a device's and
a link's figures. What of a layer is not attention has no messages: each rank does it for its own tokens. Reading ends when the last
layer's keys are there, so that layer attends to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.plan import Plan, Visit, make_plan
from ringctx.core.tiles import area
from ringctx.tools.planner.machine import Device
from ringctx.tools.planner.simulate import Costs, Link, forward
from ringctx.tools.shapes import Shapes

LAYOUTS: Mapping[str, Callable[[int, int], Layout]] = {
    "zigzag": Layout.zigzag,
    "contiguous": Layout.contiguous,
    "striped": Layout.striped,
}
TRANSPORTS = ("rotate", "fetch", "gather")
"""What is simulated: transports that move keys."""
WIDE = 4
"""Bytes of a number of a partial."""
AS_QUICK = 1.01
"""Options within so much of the quickest count as quick."""
ACTIVATIONS = 12
"""Tensors of (tokens, hidden) that a layer of prefill has at its worst: MLPs of 3 to 4 times that width, queries, keys, values, output."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is planned. link: between neighbours; node_link and nodes: equal runs of ranks that have a quicker link among themselves.

    tensor: ranks of a row, which share heads and weights; their own messages take `node_link`. page: tokens of a cache's page.
    file: bytes of the checkpoint, which are held beside the weights while these are loaded.
    """

    tokens: int
    ranks: int
    device: Device
    link: Link
    node_link: Link | None = None
    nodes: int = 1
    tensor: int = 1
    page: int = 1
    file: int = 0


@dataclass(frozen=True, kw_only=True)
class Option:
    """One layout and transport. bytes: sent by all ranks, over all layers. imbalance: the busiest rank's pairs over the mean.

    seconds: until the last rank has read, and of that rank attention, what is not attention, and messages that nothing hid.
    memory: of the rank with most of it, in bytes.
    """

    layout: str
    transport: str
    bytes: int
    hops: int
    imbalance: float
    seconds: dict[str, float]
    memory: dict[str, float]

    def __str__(self) -> str:
        s = self.seconds
        parts = f"attention {s['attention']:.3g}, the rest {s['linear']:.3g}, exposed {s['exposed']:.3g}"
        moved = f"{self.bytes / 1e9:,.3g} GB sent in {self.hops} hops"
        return f"{self.layout}, {self.transport}: {s['total']:.3g} s ({parts}), {moved}, busiest rank {self.imbalance:.2f} x the mean"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """All options: first the one to take, which of those as quick as any sends and holds least; then the others, quickest first."""

    ranks: int
    options: tuple[Option, ...]

    @property
    def best(self) -> Option:
        return self.options[0]

    def json(self) -> dict[str, Any]:
        """What `--json` prints."""
        best = asdict(self.best)
        return {"ranks": self.ranks, **best, "why": self.why()}

    def why(self) -> list[str]:
        """A line an option, and what takes the time of the best."""
        seconds = self.best.seconds
        most = max(("attention", "linear", "exposed"), key=lambda name: seconds[name])
        said = {"attention": "attention", "linear": "what is not attention", "exposed": "messages that nothing hides"}[most]
        share = seconds[most] / seconds["total"] if seconds["total"] else 0.0
        return [*map(str, self.options), f"{share:.0%} of the first one's time is {said}."]


def predict(shapes: Shapes, layers: Sequence[Attention], asked: Asked, layouts: Sequence[str] = tuple(LAYOUTS)) -> Prediction:
    """layers: the attention of each layer, first to last."""
    found = []
    for name in layouts:
        layout = LAYOUTS[name](asked.tokens, asked.ranks)
        found += [_option(shapes, Counter(layers[:-1]), asked, name, layout, transport) for transport in TRANSPORTS]
    quickest = min(one.seconds["total"] for one in found)
    best = min((one for one in found if one.seconds["total"] <= AS_QUICK * quickest), key=lambda one: (one.bytes, one.memory["total"]))
    others = sorted((one for one in found if one is not best), key=lambda one: one.seconds["total"])
    return Prediction(ranks=asked.ranks, options=(best, *others))


def _option(shapes: Shapes, layers: Mapping[Attention, int], asked: Asked, name: str, layout: Layout, transport: str) -> Option:
    total = dict.fromkeys(("attention", "exposed", "bytes"), 0.0)
    hops, visiting, loads = 0, 0, [0] * asked.ranks
    for attention, count in layers.items():
        patterns, heads = parts_of(attention, shapes.heads)
        plans = [make_plan(patterns, layout, layout, rank, transport, asked.nodes) for rank in range(asked.ranks)]
        times = forward(plans, _costs(shapes, asked, layout, patterns, heads))
        total["attention"] += count * (asked.device.call + asked.device.shared(times.computing))
        total["exposed"] += count * (times.total - max(times.computing))
        total["bytes"] += count * sum(plan.tokens_sent for plan in plans) * shapes.values_a_token * asked.device.item
        hops, visiting = max(hops, *(len(plan.hops) for plan in plans)), max(visiting, *(plan.held for plan in plans))
        loads = [load + count * _pairs(plan, heads) for load, plan in zip(loads, plans, strict=True)]
    tokens = max(layout.count(rank) for rank in range(asked.ranks))
    linear = 2 * shapes.read_params * tokens / asked.tensor / asked.device.linear
    linear += _rows(shapes, asked, tokens)
    seconds = {"total": total["attention"] + total["exposed"] + linear, "linear": linear}
    seconds |= {"attention": total["attention"], "exposed": total["exposed"]}
    return Option(
        layout=name, transport=transport, bytes=int(total["bytes"]), hops=hops, imbalance=max(loads) * len(loads) / max(sum(loads), 1),
        seconds=seconds, memory=_memory(shapes, asked, tokens, visiting),
    )  # fmt: skip


def parts_of(attention: Attention, heads: int) -> tuple[tuple[Pattern, ...], tuple[int, ...]]:
    """The patterns of head groups and branches, and how many heads each has."""
    pairs = [(pattern, len(members)) for members, seen in attention.parts(heads) for pattern, _ in seen]
    return tuple(pattern for pattern, _ in pairs), tuple(count for _, count in pairs)


def _pairs(plan: Plan, heads: Sequence[int]) -> int:
    """Query-key pairs of all heads that a rank computes."""
    visits = (plan.home, *(visit for hop in plan.hops for visit in hop.visits))
    return sum(area(rows) * count for visit in visits for rows, count in zip(visit.tiles, heads, strict=True))


def _costs(shapes: Shapes, asked: Asked, layout: Layout, patterns: Sequence[Pattern], heads: Sequence[int]) -> Costs:
    device = asked.device

    def work(rank: int, visit: Visit) -> float:
        effort = device.effort(visit, patterns, heads, shapes.width, layout.spans[rank])
        spread = 1 / asked.tensor
        return device.seconds(effort._replace(plain=spread * effort.plain, masked=spread * effort.masked, numbers=spread * effort.numbers))

    inner = asked.ranks // asked.nodes
    within = asked.node_link or asked.link
    link = lambda a, b: within if a // inner == b // inner and asked.nodes > 1 else asked.link
    moved = shapes.values_a_token * device.item / asked.tensor
    return Costs(work, moved, 2 * moved, link, post=device.post, hidden=device.hidden)


def _rows(shapes: Shapes, asked: Asked, tokens: int) -> float:
    """Seconds in which the ranks of a row add up what each computed of a layer, twice a layer: a ring's all-reduce."""
    if asked.tensor == 1:
        return 0.0
    link = asked.node_link or asked.link
    moved = 2 * (asked.tensor - 1) / asked.tensor * tokens * shapes.hidden * asked.device.item
    return 2 * shapes.layers * link.seconds(moved)


def _memory(shapes: Shapes, asked: Asked, tokens: int, visiting: int) -> dict[str, float]:
    """Bytes of a rank: the process, weights, all layers' keys, what visits and a partial to merge, and a layer's activations; or of the
    process while it loads.
    """
    device, a_token = asked.device, shapes.values_a_token * asked.device.item / asked.tensor
    by_shapes = ACTIVATIONS * shapes.hidden * device.item / asked.tensor
    held = -(-tokens // asked.page) * asked.page
    parts = {
        "base": device.base,
        "weights": shapes.params * device.item / asked.tensor,
        "keys": shapes.layers * held * a_token,
        "visiting": visiting * a_token + (visiting > 0) * tokens * shapes.heads * shapes.width * WIDE / asked.tensor,
        "activations": tokens * (by_shapes if device.activations is None else device.activations),
    }
    return {"total": max(sum(parts.values()), parts["base"] + parts["weights"] + asked.file), **parts}
