"""Efficiency and accuracy of the ring against torch's own attention, side by side in one run.

The anchor is one process with as many threads as there are ranks, torch's scaled_dot_product_attention on the whole
sequence; the ring is that many ranks of one thread each, on the same tensors. Both are timed in turn, in every round, so
that a machine that slows down slows both; medians are reported. Rank 0 runs the anchor while the others sleep in a receive.
On GPUs, one a rank, the anchor is one of them, whose time the ring's ranks are asked to divide among them.
Of an attention with a carry the anchor is the same ring without it. Floors, where they are asked for, are timed in every round too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.config import ModelConfig
from ringctx.core.attention import Attention
from ringctx.core.carry import Carry
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Message, Ring
from ringctx.device import device_of
from ringctx.tools.floors import Silent, exposed, send_only
from ringctx.tools.show.timelines import save


@dataclass(frozen=True)
class Case:
    """One row of the table: zigzag, causal, one sequence."""

    S: int
    dtype: torch.dtype
    transport: str
    h: int = 8
    g: int = 8
    d: int = 64
    kernel: str = "auto"
    carry: Carry | None = None

    @property
    def attention(self) -> Attention:
        """Causal, with the carry."""
        return Attention(carry=self.carry)

    def __str__(self) -> str:
        carry = f", {self.carry} against none" if self.carry else ""
        return f"{self.transport}{'' if self.kernel == 'auto' else ' ' + self.kernel}, {self.h}:{self.g} heads, d {self.d}{carry}"


@dataclass(frozen=True)
class Floors:
    """Milliseconds (medians, the slowest rank's) of forward + backward: with messages that are there at once; of the messages alone, None
    where more than keys travels; that messages cost in the call. efficiency: kernels over the call. hidden: 1 - exposed over messages.
    """

    kernels_ms: float
    messages_ms: float | None
    exposed_ms: float
    efficiency: float
    hidden: float | None


@dataclass(frozen=True)
class Row:
    """Milliseconds (medians) and the anchor's time over the ring's, forward and forward + backward."""

    name: str
    S: int
    ranks: int
    dtype: str
    forward_ms: float
    backward_ms: float
    anchor_forward_ms: float
    anchor_backward_ms: float
    efficiency_forward: float
    efficiency: float
    error: dict[str, float] | None = None
    floors: Floors | None = None


Times = tuple[float, float]


def measure(ring: Ring, case: Case, rounds: int, *, floors: bool = False, trace: Path | None = None) -> Row | None:
    """Time ring and anchor in turn; the row on rank 0, None elsewhere. All ranks must call this together.

    trace: a folder for the timeline of the last round, a file a rank.
    """
    layout, device = Layout.zigzag(case.S, ring.size), device_of(ModelConfig())
    q, k, v, dout = (x.to(device) for x in _tensors(case))
    mine = [layout.shard(x, ring.rank) for x in (q, k, v, dout)]

    def attend(q: Tensor, k: Tensor, v: Tensor, attention: Attention = case.attention, over: Ring = ring) -> Tensor:
        out = ring_attention(q, k, v, ring=over, layout=layout, attention=attention, transport=case.transport, kernel=case.kernel)
        assert isinstance(out, Tensor)
        return out

    plain, silent = partial(attend, attention=Attention()), partial(attend, over=Silent.like(ring))
    ours: list[Times] = []
    anchors: list[Times] = []
    below: list[tuple[float, ...]] = []
    for warmed in (attend, plain, silent)[: 2 + floors]:  # plans, allocator
        _timed(warmed, mine)
    for _ in range(rounds):
        _meet(ring, device)
        with ring.recorded() as timeline:
            ours.append(_timed(attend, mine))
        _meet(ring, device)
        if floors:
            kernels = sum(_timed(silent, mine))
            _meet(ring, device)
            below.append((kernels, _messages(ring, case, layout, mine), exposed(timeline), sum(ours[-1])))
            _meet(ring, device)
        if case.carry:
            anchors.append(_timed(plain, mine))
        elif ring.rank == 0:
            torch.set_num_threads(ring.size)
            shares = ring.size if device.type == "cuda" else 1
            forward, backward = _timed(_sdpa, [q, k, v, dout])
            anchors.append((forward / shares, backward / shares))
            torch.set_num_threads(1)
    if trace is not None:
        save(timeline, trace, ring.rank)
    slowest = _slowest(ring, ours, device)
    anchors = _slowest(ring, anchors, device) if case.carry else anchors
    found = _floors(_slowest(ring, below, device)) if floors else None
    return _row(case, ring.size, slowest, anchors, found) if ring.rank == 0 else None


def _messages(ring: Ring, case: Case, layout: Layout, tensors: list[Tensor]) -> float:
    """Seconds of the messages alone; not a number where more than keys travels."""
    if case.transport not in ("rotate", "fetch", "gather"):
        return math.nan
    began = time.perf_counter()
    for backward in (False, True):
        send_only(ring, layout, case.attention.pattern, case.transport, *tensors[1:3], backward=backward)
    _finish(tensors[1].device)
    return time.perf_counter() - began


def _floors(rounds: list[tuple[float, ...]]) -> Floors:
    kernels, messages, shown, whole = (list(column) for column in zip(*rounds, strict=True))
    ms = lambda seconds: round(1000 * statistics.median(seconds), 1)
    known = not math.isnan(messages[0])
    return Floors(
        kernels_ms=ms(kernels),
        messages_ms=ms(messages) if known else None,
        exposed_ms=ms(shown),
        efficiency=round(statistics.median(k / w for k, w in zip(kernels, whole, strict=True)), 3),
        hidden=round(1 - statistics.median(s / m for s, m in zip(shown, messages, strict=True)), 3) if known else None,
    )


def accuracy(ring: Ring, case: Case) -> dict[str, dict[str, float]] | None:
    """Relative error against fp64 of out, dq, dk, dv: of the ring, and of one call of torch's own attention in the same dtype.

    {"ring": {...}, "one call": {...}} on rank 0, None elsewhere. All ranks must call this together.
    """
    layout, device = Layout.zigzag(case.S, ring.size), device_of(ModelConfig())
    tensors = [x.to(device) for x in _tensors(case)]
    q, k, v, dout = (layout.shard(x, ring.rank) for x in tensors)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(), transport=case.transport, kernel=case.kernel)
    assert isinstance(out, Tensor)
    out.backward(dout)
    mine = [x for x in (out.detach(), q.grad, k.grad, v.grad) if x is not None]
    shards = [_collect(ring, layout, x) for x in mine]
    if ring.rank:
        return None
    torch.set_num_threads(2)
    exact = _whole(_sdpa, [x.double() for x in tensors])
    once = _whole(_sdpa, tensors)
    torch.set_num_threads(1)
    names = ("out", "dq", "dk", "dv")
    far = lambda got: {n: float((x.double() - y).norm() / y.norm()) for n, x, y in zip(names, got, exact, strict=True)}
    return {"ring": far([layout.unshard(x) for x in shards]), "one call": far(once)}


def _collect(ring: Ring, layout: Layout, mine: Tensor) -> list[Tensor]:
    """Every rank's shard, on rank 0."""
    others = list(range(1, ring.size))
    if ring.rank:
        ring.exchange("results", "a result", (), [Message(0, (mine.contiguous(),))]).wait()
        return []
    shards = {r: mine.new_empty(mine.shape[0], layout.count(r), *mine.shape[2:]) for r in others}
    ring.exchange("results", "results", [Message(r, (x,)) for r, x in shards.items()]).wait()
    return [mine, *shards.values()]


def _whole(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def _tensors(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (case.h, case.g, case.g, case.h)
    return [torch.randn(1, case.S, n, case.d, generator=generator).to(case.dtype) for n in heads]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True).transpose(1, 2)


def _timed(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Times:
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    _finish(q.device)
    began = time.perf_counter()
    out = attend(*leaves)
    _finish(q.device)
    middle = time.perf_counter()
    out.backward(dout)
    _finish(q.device)
    return middle - began, time.perf_counter() - middle


def _meet(ring: Ring, device: torch.device) -> None:
    _finish(device)
    if ring.group is not None:
        dist.barrier(ring.group)


def _finish(device: torch.device) -> None:
    """Wait for what this rank's GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(ring: Ring, times: Sequence[tuple[float, ...]], device: torch.device) -> list[Any]:
    """Each round as long as its slowest rank took."""
    found = torch.tensor(times, dtype=torch.float64, device=device)
    if ring.group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, ring.group)
    return [tuple(row) for row in found.tolist()]


def _row(case: Case, ranks: int, ours: list[Times], anchors: list[Times], floors: Floors | None) -> Row:
    forward, backward = (statistics.median(t[n] for t in ours) for n in (0, 1))
    anchor_forward, anchor_backward = (statistics.median(t[n] for t in anchors) for n in (0, 1))
    ratio = statistics.median((a[0] + a[1]) / (o[0] + o[1]) for a, o in zip(anchors, ours, strict=True))
    ratio_forward = statistics.median(a[0] / o[0] for a, o in zip(anchors, ours, strict=True))
    dtype = str(case.dtype).removeprefix("torch.")
    ms = lambda seconds: round(1000 * seconds, 1)
    return Row(
        name=str(case),
        S=case.S,
        ranks=ranks,
        dtype=dtype,
        forward_ms=ms(forward),
        backward_ms=ms(backward),
        anchor_forward_ms=ms(anchor_forward),
        anchor_backward_ms=ms(anchor_backward),
        efficiency_forward=round(ratio_forward, 3),
        efficiency=round(ratio, 3),
        floors=floors,
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    heads = ["case", "S", "ranks", "dtype", "forward ms, anchor", "backward ms, anchor", "efficiency forward", "forward + backward"]
    if any(row.floors for row in rows):
        heads += ["kernels alone ms", "of it", "messages alone ms", "exposed ms", "hidden"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *map(_cells, rows)))


def _cells(r: Row) -> list[str]:
    times = f"{r.forward_ms}, {r.anchor_forward_ms}", f"{r.backward_ms}, {r.anchor_backward_ms}"
    cells = [r.name, str(r.S), str(r.ranks), r.dtype, *times, f"{r.efficiency_forward:.2f}", f"**{r.efficiency:.2f}**"]
    if r.floors is not None:
        f = r.floors
        messages = ["", str(f.exposed_ms), ""] if f.hidden is None else [str(f.messages_ms), str(f.exposed_ms), f"{f.hidden:.0%}"]
        cells += [str(f.kernels_ms), f"{f.efficiency:.2f}", *messages]
    return cells


def as_json(rows: list[Row]) -> list[dict[str, object]]:
    """The rows for `--json`."""
    return [asdict(r) for r in rows]
