"""Traffic, counted from outside: fetch moves the keys that the dense mask shows to be needed, and not one more; rotate stops early."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ringctx import Attention, Layout, ring_attention
from ringctx.patterns import causal
from ringctx.patterns import window as window_of
from tests.cases import Case, on_rank, problem
from tests.pool import Pool
from tests.wire import tapped

PATTERNS = [
    "causal",
    "causal&window9",
    "causal&window300",
    "causal&(window40|sinks4)",
    "causal&documents",
    "blocks",
    "per_head",
    "longformer",
]
WIDE = {"fp32": 4, "fp64": 8, "bf16": 4}  # dk and dv travel in the accumulation dtype: fp32, and fp64 for fp64
ITEM = {"fp32": 4, "fp64": 8, "bf16": 2}


def _counted(ring: Any, case: Case) -> dict[str, Any]:
    """Bytes of keys and gradients by direction, forward and backward, and what the ring itself says."""
    given = problem(case)
    q = given.part(given.q, ring.rank, given.layout, given.i).requires_grad_()
    k, v = (given.part(x, ring.rank, given.key_layout, given.j).requires_grad_() for x in (given.k, given.v))
    ring.traffic.reset()
    with tapped() as forward:
        out = ring_attention(
            q,
            k,
            v,
            ring=ring,
            layout=given.layout,
            key_layout=given.key_layout,
            attention=given.attention,
            transport=case.transport,
            seed=case.seed,
        )
    told = {"received": dict(ring.traffic.received), "sent": dict(ring.traffic.sent)}
    ring.traffic.reset()
    with tapped() as backward:
        torch.autograd.grad(out, (q, k, v), given.part(given.dout, ring.rank, given.layout, given.i))
    told |= {"back_received": dict(ring.traffic.received), "back_sent": dict(ring.traffic.sent)}
    seen = {name: wire.bytes(incoming) for name, wire, incoming in (("received", forward, True), ("sent", forward, False))}
    seen |= {name: wire.bytes(incoming) for name, wire, incoming in (("back_received", backward, True), ("back_sent", backward, False))}
    everything = sum(size for wire in (forward, backward) for _, _, size in (*wire.received, *wire.sent))
    return {"told": told, "seen": seen, "everything": everything}


def _needed(case: Case) -> list[list[int]]:
    """[rank][owner]: distinct keys of the owner that the dense mask lets some query, head and batch row of the rank see."""
    given = problem(case)
    seen = given.attention.pattern.allows(given.i, given.j)
    seen = seen.reshape(-1, *seen.shape[-2:]).any(0)
    rows = [torch.searchsorted(given.i, given.layout.indices(r)) for r in range(case.size)]
    columns = [torch.searchsorted(given.j, given.key_layout.indices(r)) for r in range(case.size)]
    return [[int(seen[a][:, b].any(0).sum()) if r != o else 0 for o, b in enumerate(columns)] for r, a in enumerate(rows)]


def _key_bytes(case: Case, item: int) -> int:
    """Bytes of one key and one value."""
    return case.batch * case.heads[1] * sum(case.widths) * item


@pytest.mark.parametrize("keys", ["same", "chunk", "gaps"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fetch_moves_exactly_what_is_needed(pool: Pool, pattern: str, layout: str, keys: str) -> None:
    case = Case(
        size=3 if layout == "zigzag" else 4,
        length=203,
        layout=layout,
        pattern=pattern,
        route="fetch",
        keys=keys,
        heads=(4, 2),
        widths=(16, 24),
    )
    for dtype in ("fp64", "bf16"):
        case = replace(case, dtype=dtype)
        key, grad = _key_bytes(case, ITEM[dtype]), _key_bytes(case, WIDE[dtype])
        needed = _needed(case)
        for rank, found in enumerate(pool.run(_counted, case, size=case.size)):
            mine, lent = sum(needed[rank]), sum(row[rank] for row in needed)
            assert found["seen"] == {
                "received": mine * key,
                "sent": lent * key,
                "back_received": mine * key + lent * grad,
                "back_sent": lent * key + mine * grad,
            }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("window", [1, 2, 9, 50, 51, 52, 101, 102, 103, 1000])
def test_rotate_stops_when_no_window_reaches_further(pool: Pool, window: int, size: int) -> None:
    s = 51
    hops = pool.run(_window_hops, window, s, size=size)
    expected = min(size - 1, -(-(window - 1) // s))
    assert max(hops) == expected
    assert hops == [min(rank, expected) for rank in range(size)]


def _window_hops(ring: Any, window: int, s: int) -> int:
    """How many times keys arrive at this rank."""
    q, k, v = (torch.randn(1, s, 2, 16) for _ in range(3))
    with tapped() as wire:
        ring_attention(
            q,
            k,
            v,
            ring=ring,
            layout=Layout.contiguous(s * ring.size, ring.size),
            attention=Attention(pattern=causal() & window_of(window)),
            transport="rotate",
        )
    return sum(len(shape) == 4 for _, shape, _ in wire.received) // 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", ["rotate", "fetch", "gather", "heads", "pass_q", "usp", "double"])
def test_the_ring_counts_what_crosses(pool: Pool, route: str, dtype: str) -> None:
    case = Case(
        size=4,
        length=130,
        layout="zigzag",
        pattern="causal&documents",
        route=route,
        dtype=dtype,
        heads=(4, 2),
        widths=(16, 24),
        scores="sink",
    )
    for found in pool.run(_counted, case, size=4, fold=case.fold):
        told = sum(sum(kinds.values()) for kinds in found["told"].values())
        assert told == found["everything"]


def test_keys_are_not_expanded_for_groups_of_heads(pool: Pool) -> None:
    case = Case(size=4, length=64, layout="contiguous", pattern="full", route="gather", heads=(8, 1), dtype="fp32")
    for found in pool.run(_counted, case, size=4):
        assert found["seen"]["received"] == 48 * _key_bytes(case, 4)


def test_a_ring_of_one_sends_nothing(pool: Pool) -> None:
    case = Case(size=1, length=33, layout="striped", pattern="causal", route="auto", dtype="fp32")
    (found,) = pool.run(_counted, case, size=1)
    assert found["everything"] == 0 and not any(found["told"].values())


def test_the_tap_does_not_change_results(pool: Pool) -> None:
    """The wire's counting is itself checked: a job under the tap gives what it gives without it."""
    case = Case(size=2, length=20, layout="zigzag", pattern="causal", route="rotate")
    plain = pool.run(on_rank, case, size=2)
    tap = pool.run(_tapped_on_rank, case, size=2)
    assert all(torch.equal(a["dk"], b["dk"]) for a, b in zip(plain, tap, strict=True))


def _tapped_on_rank(ring: Any, case: Case) -> dict[str, Any]:
    with tapped():
        return on_rank(ring, case)


@pytest.mark.parametrize("route", ["auto", "rotate", "fetch"])
@pytest.mark.parametrize("size", [2, 4])
def test_atrous_attention_sends_nothing_on_the_residue_layout_where_the_ranks_divide_the_rate(pool: Pool, size: int, route: str) -> None:
    case = Case(size, 203, "residue", "causal&dilated4", route)  # the layout's dilation is 4 too
    parts = pool.run(_counted, case, size=size)
    assert all(
        part["everything"] == sum(part["told"][way]["header"] for way in ("sent", "received", "back_sent", "back_received"))
        for part in parts
    )
    dense = pool.run(_counted, replace(case, layout="contiguous", route="fetch"), size=size)
    assert any(sum(part["seen"].values()) for part in dense)


def test_atrous_attention_sends_keys_where_the_ranks_do_not_divide_the_rate(pool: Pool) -> None:
    assert any(sum(part["seen"].values()) for part in pool.run(_counted, Case(3, 203, "residue", "causal&dilated4", "fetch"), size=3))
