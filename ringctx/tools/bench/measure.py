"""Efficiency and accuracy of the ring against torch's own attention, side by side in one run.

The anchor is one process with as many threads as there are ranks, cores at most, torch's scaled_dot_product_attention on the whole
sequence; the ring is that many ranks of one thread each, on the same tensors. Both are timed in turn, in every round, so
that a machine that slows down slows both; medians are reported. Rank 0 runs the anchor while the others sleep in a receive.
On GPUs, one a rank, the anchor is one of them, whose time the ring's ranks are asked to divide among them.
Of an attention with a carry the anchor is the same ring without it. Floors and peers, where they are asked for, are timed in every round
too; a peer that is wrong or breaks off is not timed. All of them run in processes that keep freed memory, as those that read and train do.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ringctx.config import ModelConfig
from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.device import device_of, keep_freed_memory
from ringctx.tools.bench.beside import Beside, Other
from ringctx.tools.bench.case import Case, Times, finish, meet, sdpa, slowest, tensors_of, timed
from ringctx.tools.bench.peers import Peer
from ringctx.tools.floors import Silent, exposed, send_only
from ringctx.tools.show.timelines import save


@dataclass(frozen=True)
class Floor:
    """Milliseconds (medians, the slowest rank's): with messages that are there at once; of the messages alone, None where more than keys
    travels; that messages cost in the call. efficiency: kernels over the call. hidden: 1 - exposed over messages. over_larger: call
    over the larger of kernels and messages.
    """

    kernels_ms: float
    messages_ms: float | None
    exposed_ms: float
    efficiency: float
    hidden: float | None
    over_larger: float | None


@dataclass(frozen=True)
class Floors:
    """Of forward, of backward, and of both."""

    forward: Floor
    backward: Floor
    both: Floor


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
    peers: tuple[Beside, ...] = ()


def measure(
    ring: Ring, case: Case, rounds: int, *, floors: bool = False, trace: Path | None = None, peers: Sequence[Peer] = ()
) -> Row | None:
    """Time ring, anchor and peers in turn; the row on rank 0, None elsewhere. All ranks must call this together.

    trace: a folder for the timeline of the last round, a file a rank.
    """
    keep_freed_memory()
    layout, device = Layout.zigzag(case.S, ring.size), device_of(ModelConfig())
    q, k, v, dout = (x.to(device) for x in tensors_of(case))
    others = [Other(peer, ring, case, device) for peer in peers]
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
        timed(warmed, mine)
    for _ in range(rounds):
        for other in others:
            other.round()
        meet(ring, device)
        with ring.recorded() as timeline:
            ours.append(timed(attend, mine))
        meet(ring, device)
        if floors:
            kernels = timed(silent, mine)
            meet(ring, device)
            below.append((*kernels, *_messages(ring, case, layout, mine), *exposed(timeline), *ours[-1]))
            meet(ring, device)
        if case.carry:
            anchors.append(timed(plain, mine))
        elif ring.rank == 0:
            torch.set_num_threads(min(ring.size, len(os.sched_getaffinity(0))))
            shares = ring.size if device.type == "cuda" else 1
            forward, backward = timed(sdpa, [q, k, v, dout])
            anchors.append((forward / shares, backward / shares))
            torch.set_num_threads(1)
    if trace is not None:
        save(timeline, trace, ring.rank)
    slowest_of_ours = slowest(ring, ours, device)
    anchors = slowest(ring, anchors, device) if case.carry else anchors
    found = _floors(slowest(ring, below, device)) if floors else None
    told = [(other, slowest(ring, other.times, device)) for other in others]
    if ring.rank:
        return None
    return _row(case, ring.size, slowest_of_ours, anchors, found, tuple(other.beside(times, anchors) for other, times in told))


def _messages(ring: Ring, case: Case, layout: Layout, tensors: list[Tensor]) -> Times:
    """Seconds of the messages alone, of forward and of backward; not numbers where more than keys travels."""
    if case.transport not in ("rotate", "fetch", "gather"):
        return math.nan, math.nan
    moments = [time.perf_counter()]
    for backward in (False, True):
        send_only(ring, layout, case.attention.pattern, case.transport, *tensors[1:3], backward=backward)
        finish(tensors[1].device)
        moments.append(time.perf_counter())
    return moments[1] - moments[0], moments[2] - moments[1]


def _floors(rounds: list[tuple[float, ...]]) -> Floors:
    """rounds: kernels, messages, exposed and the call, of each forward and backward."""
    columns = list(zip(*rounds, strict=True))
    ways = [columns[::2], columns[1::2]]
    ways.append([tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(*ways, strict=True)])
    return Floors(*(_floor(*way) for way in ways))


def _floor(kernels: Sequence[float], messages: Sequence[float], shown: Sequence[float], whole: Sequence[float]) -> Floor:
    ms = lambda seconds: round(1000 * statistics.median(seconds), 1)
    ratio = lambda a, b: round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)
    known = not math.isnan(messages[0])
    return Floor(
        kernels_ms=ms(kernels),
        messages_ms=ms(messages) if known else None,
        exposed_ms=ms(shown),
        efficiency=ratio(kernels, whole),
        hidden=round(1 - ratio(shown, messages), 3) if known else None,
        over_larger=ratio(whole, list(map(max, kernels, messages))) if known else None,
    )


def _row(case: Case, ranks: int, ours: list[Times], anchors: list[Times], floors: Floors | None, peers: tuple[Beside, ...]) -> Row:
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
        peers=peers,
    )
