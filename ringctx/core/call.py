"""Call: everything about one ring attention that does not change with the numbers in its tensors, and how it runs.

The operator (`ringctx.core.operator`) hands tensors and a call's number to `forward` and `backward` here. Heads are traded
for tokens on the way in and back on the way out where the transport says so; between, one of the two loops runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ringctx.core import loop, pass_q, relay
from ringctx.core.attention import Attention, finished
from ringctx.core.carried import CarriedWork
from ringctx.core.carry import carry_problem
from ringctx.core.choose import TRANSPORTS, Choice, Shape, choose
from ringctx.core.compute import HeadGroup, Work, head_groups
from ringctx.core.header import Facts, agree
from ringctx.core.heads import HeadGroupExchange, Trade, Traded, make_trade, shares
from ringctx.core.layout import Layout
from ringctx.core.masks import MASKS
from ringctx.core.pattern import Pattern
from ringctx.core.plan import Plan, make_plan, steps_of, wanted
from ringctx.core.ring import Ring
from ringctx.core.sums import Sum
from ringctx.core.tiles import forget_tiles
from ringctx.errors import ConfigError, LayoutError, RingctxError, Unsupported
from ringctx.kernels.base import accumulation_dtype


@dataclass(frozen=True)
class Route:
    """How a call's tensors travel: members of the head group, its trades, and the plan between groups."""

    transport: str
    members: int
    groups: tuple[HeadGroup, ...]
    inner: Ring
    layout: Layout
    key_layout: Layout
    q_heads: tuple[range, ...]
    k_heads: tuple[range, ...]
    trades: tuple[Trade, Trade] | None
    plan: Plan | pass_q.QueryPlan
    choice: Choice | None

    @property
    def shared_keys(self) -> bool:
        """Whether a key head lives on several members, so that its gradients must be summed."""
        return sum(map(len, self.k_heads)) > len({h for heads in self.k_heads for h in heads})

    def explain(self) -> str:
        """Which transport and why, then the plan."""
        why = [self.choice.explain()] if self.choice else []
        trade = [f"heads traded for tokens among {self.members} ranks; query heads each {[len(x) for x in self.q_heads]}"] * (
            self.members > 1
        )
        return "\n".join([*why, *trade, self.plan.explain()])


@dataclass(frozen=True, eq=False)
class Call:
    """One way of calling ring_attention. train: whether a backward will follow (it counts in the choice of transport).

    measure: whether a carry's memory is wanted. has_start: whether the last of params is what this rank's keys carried before.
    """

    ring: Ring
    layout: Layout
    key_layout: Layout
    attention: Attention
    transport: str
    kernel: str
    train: bool
    train_params: bool = False
    measure: bool = False
    has_start: bool = False
    routes: dict[Shape, Route] = field(default_factory=dict)

    def problem(self, q: Tensor, k: Tensor, v: Tensor) -> RingctxError | None:
        """Why this rank's tensors cannot be attended, or None."""
        ring, layout, key_layout = self.ring, self.layout, self.key_layout
        if self.transport not in ("auto", *TRANSPORTS):
            return ConfigError(f"transport must be one of auto {' '.join(TRANSPORTS)}; got {self.transport!r}.")
        if layout.size != ring.size or key_layout.size != ring.size:
            return LayoutError(
                f"The ring has {ring.size} ranks, but the layouts have {layout.size} and {key_layout.size}; make them for {ring.size}."
            )
        if {q.dim(), k.dim(), v.dim()} != {4}:
            return LayoutError(f"q, k and v must be (b, s, heads, width); got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}.")
        if q.shape[1] != layout.count(ring.rank):
            return LayoutError(
                f"q has {q.shape[1]} tokens, but the layout gives rank {ring.rank} {layout.count(ring.rank)}; use layout.shard."
            )
        if k.shape[1] != key_layout.count(ring.rank) or v.shape[1] != k.shape[1]:
            have = f"k has {k.shape[1]} tokens and v {v.shape[1]}"
            return LayoutError(
                f"{have}, but the layout gives rank {ring.rank} {key_layout.count(ring.rank)}; use layout.shard, or pass key_layout."
            )
        if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[2] != v.shape[2]:
            return LayoutError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must share the batch, q and k the width, k and v the heads."
            )
        if not k.shape[2] or q.shape[2] % k.shape[2]:
            return LayoutError(f"The {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key heads.")
        if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
            return LayoutError(f"q, k and v must have one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}. Cast them before the call.")
        batch, sink = self.attention.seen.batch(), self.attention.sink
        if batch not in (None, q.shape[0]):
            return LayoutError(
                f"The pattern tells {batch} rows of a batch apart, but q has {q.shape[0]}; make it from the ids of this batch."
            )
        if sink is not None and len(sink) != q.shape[2]:
            return LayoutError(f"The sink has {len(sink)} logits, but there are {q.shape[2]} query heads; give one each.")
        return self._branches_problem(q, k) or self._scores_problem(q.shape[2], q.device) or self._carry_problem(q.shape[2])

    def _carry_problem(self, num_heads: int) -> RingctxError | None:
        if self.attention.carry is None:
            return None
        if self.train and self.has_start:
            return Unsupported("What keys carried before a call has no gradient; give `carry` under torch.no_grad(), or leave it out.")
        layouts = self.layout, self.key_layout
        return carry_problem(self.attention.pattern, num_heads, layouts, self.transport, self.ring.heads)

    def _branches_problem(self, q: Tensor, k: Tensor) -> RingctxError | None:
        """Ask every branch for the encoding of no token: one that does not fit the width says so before anything moves."""
        none = torch.zeros(0, dtype=torch.int64, device=q.device)
        for branch in self.attention.branches:
            if branch.encoding is None:
                continue
            try:
                shapes = branch.encoding.queries(q[:, :0], none).shape, branch.encoding.keys(k[:, :0], none).shape
            except RingctxError as error:
                return error
            except RuntimeError as error:
                return LayoutError(f"The branch {branch} cannot encode heads of width {q.shape[3]} ({error}); make it for that width.")
            if shapes != (q[:, :0].shape, k[:, :0].shape):
                return LayoutError(f"The branch {branch} changes the shape of heads of width {q.shape[3]}; make it for that width.")
        return None

    def _scores_problem(self, num_heads: int, device: torch.device) -> RingctxError | None:
        """Ask every additive score for the last pair of indices: a table that is too small says so before anything moves."""
        if not self.layout.length or not self.key_layout.length:
            return None
        i, j = (torch.tensor([x.length - 1], device=device) for x in (self.layout, self.key_layout))
        for score in self.attention.additive:
            try:
                score.bias(torch.arange(num_heads, device=device), i, j, score.params())
            except RingctxError as error:
                return error
            except (IndexError, RuntimeError) as error:
                reach = f"{num_heads} heads, query {int(i)} and key {int(j)}"
                return LayoutError(f"{score} does not reach {reach} ({error}); make it for this sequence and these heads.")
        return None

    def facts(self, q: Tensor, k: Tensor, v: Tensor, what: str, seed: int, batch_offset: int) -> Facts:
        """What must be equal on all ranks."""
        return {
            "call": what,
            "batch": q.shape[0],
            "heads": q.shape[2],
            "key heads": k.shape[2],
            "width": q.shape[3],
            "value width": v.shape[3],
            "dtype": str(q.dtype).removeprefix("torch."),
            "layout": f"{self.layout} ({_digest(self.layout)})",
            "key layout": f"{self.key_layout} ({_digest(self.key_layout)})",
            "attention": f"{str(self.attention)[:200]} ({_digest(self.attention.text())})",
            "transport": self.transport,
            "kernel": self.kernel,
            "seed": seed,
            "batch offset": batch_offset,
            "training": self.train,
            "carry given": self.has_start,
        }

    def way(self, route: Route, work: CarriedWork) -> relay.Way:
        """How keys travel with what they carry."""
        assert isinstance(route.plan, Plan)
        return relay.Way(self.ring, self.layout, self.key_layout, route.plan, work)

    def kept_sizes(self, route: Route) -> list[int]:
        """Of a call with a carry: how many numbers a batch row each kept tensor has."""
        way = self.way(route, CarriedWork(self.attention, route.groups, (), self.kernel, 0, 0))
        return relay.kept_sizes(way) * self.train + [self.key_layout.count(self.ring.rank)] * self.has_start

    def route(self, q: Tensor, k: Tensor, v: Tensor) -> Route:
        """How tensors of these shapes travel."""
        item, wide = q.element_size(), accumulation_dtype(q.dtype).itemsize
        shape = Shape(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], item, wide, self.train)
        if shape not in self.routes:
            self.routes[shape] = _route(self.ring, self.layout, self.key_layout, self.attention, self.transport, shape)
        return self.routes[shape]


@lru_cache(maxsize=1024)
def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def forget_plans() -> None:
    """Empty the caches of everything that is planned by pattern: for patterns that are used once."""
    forget_tiles()
    MASKS.forget()
    for cached in (choose, make_plan, steps_of, wanted, pass_q.make_query_plan, _digest):
        cached.cache_clear()


def _route(ring: Ring, layout: Layout, key_layout: Layout, attention: Attention, transport: str, shape: Shape) -> Route:
    whole = head_groups(attention, shape.h, shape.g)
    patterns = tuple(g.pattern for g in whole)
    choice = None
    if ring.size == 1:
        transport = "rotate" if transport in ("auto", "heads") else transport
    elif transport == "auto":
        if ring.heads == 1:
            choice = choose(patterns, layout, key_layout, shape, ring.nodes, *([()] if attention.carry else []))
            transport = choice.transport
    members = ring.size if transport == "heads" else ring.heads
    q_heads, k_heads = shares(shape.h, shape.g, members)
    if members == 1:
        plan = _plan(patterns, layout, key_layout, ring.rank, transport, ring.nodes)
        return Route(transport, 1, whole, ring, layout, key_layout, q_heads, k_heads, None, plan, choice)
    trades = make_trade(layout, members, ring.rank), make_trade(key_layout, members, ring.rank)
    me, circle = ring.rank % members, ring.rank // members
    inner = ring.view([c * members + me for c in range(ring.size // members)])
    inner.nodes = ring.nodes if inner.size % ring.nodes == 0 else 1
    groups = head_groups(attention, shape.h, shape.g, q_heads[me], k_heads[me].start) if q_heads[me] else ()
    patterns = tuple(g.pattern for g in groups)
    if transport == "auto":  # inside each head group the same choice, since all heads count
        choice = choose(tuple(g.pattern for g in whole), trades[0].inner, trades[1].inner, shape, inner.nodes, ("pass_q",))
    within = "rotate" if transport == "heads" else choice.transport if choice else transport
    plan = _plan(patterns, trades[0].inner, trades[1].inner, circle, within, inner.nodes)
    return Route(within, members, groups, inner, trades[0].inner, trades[1].inner, q_heads, k_heads, trades, plan, choice)


def _plan(
    patterns: tuple[Pattern, ...], layout: Layout, key_layout: Layout, rank: int, transport: str, nodes: int
) -> Plan | pass_q.QueryPlan:
    if transport == "pass_q":
        return pass_q.make_query_plan(patterns, layout, key_layout, rank)
    return make_plan(patterns, layout, key_layout, rank, transport, nodes)


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, params: list[Tensor], seed: int, batch_offset: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """out (b s h e), lse (b s h), a carry's memory (b s) or an empty tensor, and what is kept besides.

    Kept for backward: the traded q, k, v, out, lse; what keys carried where chunks met them. And what they carry now, if asked.
    """
    problem = call.problem(q, k, v) or (start_problem(params[-1], k) if call.has_start else None)
    try:
        route = None if problem else call.route(q, k, v)
        if route:
            work = _work(call, route, params, seed, batch_offset, call.train_params)
            work.check(route.plan.all_tiles, q, v.shape[3], call.train)
    except RingctxError as error:
        problem = error
    agree(call.ring, call.facts(q, k, v, "forward", seed, batch_offset), problem)
    assert route is not None
    with call.ring.unbroken("forward"):
        if isinstance(work, CarriedWork):
            start = params[-1] if call.has_start else None
            out, lse, memory, met, now = relay.forward(call.way(route, work), q, k, v, start, call.measure)
            return out, lse, memory, [x.data for x in met] * call.train + [now] * call.has_start
        out, lse, kept = _forward(call, route, work, q, k, v)
        return out, lse, lse.new_empty(0), kept


def start_problem(start: Tensor, k: Tensor) -> RingctxError | None:
    """Why this tensor cannot be what keys k (b n g d) carried before, or None."""
    shape, dtype = tuple(k.shape[:2]), accumulation_dtype(k.dtype)
    if tuple(start.shape) == shape and start.dtype == dtype:
        return None
    return LayoutError(f"carry is a number per key of this rank, {shape} in {dtype}; got {tuple(start.shape)} in {start.dtype}.")


def _work(call: Call, route: Route, params: list[Tensor], seed: int, batch_offset: int, need_param_grads: bool) -> Work:
    kind = Work if call.attention.carry is None else CarriedWork
    return kind(call.attention, route.groups, params, call.kernel, seed, batch_offset, need_param_grads)


def _forward(call: Call, route: Route, work: Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    if route.trades is None:
        out, lse = _run_forward(work, route, q, k, v)
        return out, lse, []
    exchange = HeadGroupExchange(call.ring, route.members)
    queries, keys = route.trades
    shared = [Traded(x, route.k_heads, keys) for x in (k, v)]
    q_, k_, v_ = exchange.to_heads("queries, keys and values for heads", Traded(q, route.q_heads, queries), *shared)
    out_, lse_ = _run_forward(work, route, q_, k_, v_)
    out, lse = exchange.to_tokens("outputs for tokens", *(Traded(x, route.q_heads, queries) for x in (out_, lse_)))
    return out, lse, [q_, k_, v_, out_, lse_] if call.train else []


def _run_forward(work: Work, route: Route, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(route.plan, pass_q.QueryPlan):
        out, lse = pass_q.forward(work, route.plan, route.inner, route.layout, route.key_layout, q, k, v)
    else:
        out, lse = loop.forward(work, route.plan, route.inner, route.layout.spans[route.plan.rank], q, k, v)
    return finished(work.attention, out, lse), lse


def backward(
    call: Call,
    dout: Tensor,
    dlse: Tensor | None,
    dmemory: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    kept: list[Tensor],
    params: list[Tensor],
    seed: int,
    batch_offset: int,
    need_param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """dq, dk, dv with the shapes and dtype of q, k, v = saved[:3], and this rank's share of each param's gradient."""
    q, k, v, out, lse = saved
    given = {"gradient of lse": dlse is not None, "gradient of memory": dmemory is not None}
    facts = {**call.facts(q, k, v, "backward", seed, batch_offset), **given}
    agree(call.ring, facts)
    with call.ring.unbroken("backward"):
        route = call.route(q, k, v)
        work = _work(call, route, params, seed, batch_offset, need_param_grads)
        if isinstance(work, CarriedWork):
            way = call.way(route, work)
            rows = (dout.to(q.dtype), q, out, lse.masked_fill(lse == -torch.inf, 0.0), dlse, dmemory)
            dq, dk, dv = (x.narrow().contiguous() for x in relay.backward(way, rows, k, v, way.packed(kept)))
        elif route.trades is None:
            dq, dk, dv = (x.narrow().contiguous() for x in _run_backward(work, route, dout, dlse, q, k, v, out, lse))
        else:
            exchange = HeadGroupExchange(call.ring, route.members)
            queries, keys = route.trades
            q_, k_, v_, out_, lse_ = kept
            slopes = [dout.to(q.dtype)] if dlse is None else [dout.to(q.dtype), dlse]
            dout_, *more = exchange.to_heads("gradients for heads", *(Traded(x, route.q_heads, queries) for x in slopes))
            dlse_ = more[0] if more else None
            grads = _run_backward(work, route, dout_, dlse_, q_, k_, v_, out_, lse_)
            shared = [Traded(x.wide() if route.shared_keys else x.narrow(), route.k_heads, keys) for x in grads[1:]]  # sums travel wide
            dq, dk, dv = exchange.to_tokens("dq, dk and dv for tokens", Traded(grads[0].narrow(), route.q_heads, queries), *shared)
            out, lse, dout, dlse = out_, lse_, dout_, dlse_
        if need_param_grads and call.attention.sink is not None and route.groups:
            work.sink_grad(dout, out, lse, dlse)
        grads_of_params = [g.to(p.dtype) for g, p in zip(work.param_grads, params, strict=True)] if need_param_grads else []
        return dq, dk.to(k.dtype), dv.to(v.dtype), grads_of_params


def _run_backward(
    work: Work, route: Route, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Sum, Sum, Sum]:
    if work.attention.normaliser == "sum":  # dA = exp(A - lse) dout'.v with dout' = exp(lse) dout: no dout.out is taken off, so out is 0
        dout, out = finished(work.attention, dout, lse), torch.zeros_like(out)
    if isinstance(route.plan, pass_q.QueryPlan):
        return pass_q.backward(work, route.plan, route.inner, route.layout, route.key_layout, dout, dlse, q, k, v, out, lse)
    return loop.backward(work, route.plan, route.inner, route.layout.spans[route.plan.rank], dout, dlse, q, k, v, out, lse)
