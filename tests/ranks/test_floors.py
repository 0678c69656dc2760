"""Floors: the messages alone are exactly the call's, kernels alone send nothing, and `bench` puts both beside the call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ringctx import Attention, Layout, ring_attention
from ringctx.core.ring import Ring
from ringctx.patterns import causal, window
from ringctx.tools import bench
from ringctx.tools.floors import MOVED, Silent, send_only
from tests.pool import Pool

S = 333


def sent(ring: Ring, transport: str, is_windowed: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Bytes by kind: of a call forward and backward, of its messages alone, and of the call on a silent ring."""
    pattern = causal() & window(90) if is_windowed else causal()
    layout = Layout.zigzag(S, ring.size)
    make = torch.Generator().manual_seed(0)
    q, k, v = (layout.shard(torch.randn(1, S, 4, 16, generator=make), ring.rank).requires_grad_() for _ in range(3))
    found, silent = [], Silent.like(ring)
    for over in (ring, None, silent):
        ring.traffic.reset()
        if over is None:
            for backward in (False, True):
                send_only(ring, layout, pattern, transport, k.detach(), v.detach(), backward=backward)
        else:
            out = ring_attention(q, k, v, ring=over, layout=layout, attention=Attention(pattern), transport=transport)
            assert isinstance(out, torch.Tensor) and out.isfinite().all()
            out.sum().backward()
        found.append({kind: n for kind, n in ring.traffic.sent.items() if kind in MOVED})
    assert not silent.traffic.sent
    return found[0], found[1], found[2]


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("transport", ["rotate", "fetch", "gather"])
@pytest.mark.parametrize("size", [2, 3])
def test_messages_alone_are_those_of_the_call(pool: Pool, size: int, transport: str, is_windowed: bool) -> None:
    for call, alone, silent in pool.run(sent, transport, is_windowed, size=size):
        assert call == alone and sum(call.values()) > 0 and silent == {}


def sent_silently(ring: Ring, transport: str) -> dict[str, int]:
    layout, silent = Layout.zigzag(S, ring.size), Silent.like(ring)
    x = torch.ones(1, layout.count(ring.rank), 4, 16, requires_grad=True)
    ring.traffic.reset()
    out = ring_attention(x, x, x, ring=silent, layout=layout, attention=Attention(), transport=transport)
    assert isinstance(out, torch.Tensor) and out.isfinite().all()
    out.sum().backward()
    return dict(ring.traffic.sent + silent.traffic.sent)


@pytest.mark.parametrize("transport", ["heads", "pass_q"])
def test_a_silent_ring_takes_every_transport(pool: Pool, transport: str) -> None:
    assert pool.run(sent_silently, transport, size=2) == [{}, {}]


def measured(ring: Ring, transport: str, folder: str) -> Any:
    torch.set_num_threads(1)
    return bench.measure(ring, bench.Case(S, torch.float32, transport, h=4, g=2, d=16), 2, floors=True, trace=Path(folder))


def test_bench_puts_floors_beside_the_call(pool: Pool, tmp_path: Path) -> None:
    rotate, none = pool.run(measured, "rotate", str(tmp_path), size=2)
    assert none is None
    for floor in (rotate.floors.forward, rotate.floors.backward, rotate.floors.both):
        assert floor.kernels_ms > 0 and floor.messages_ms > 0 and floor.hidden <= 1 and floor.over_larger > 0
    assert rotate.floors.both.exposed_ms >= max(rotate.floors.forward.exposed_ms, rotate.floors.backward.exposed_ms) > 0
    heads, _ = pool.run(measured, "heads", str(tmp_path), size=2)
    assert heads.floors.both.messages_ms is None and heads.floors.both.hidden is None
    lines = bench.table([rotate, heads]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "both: kernels, messages" in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"rank-0.trace.json", "rank-1.trace.json"}
