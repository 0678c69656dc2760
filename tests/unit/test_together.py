"""Which tiles are computed in one call, and that a sparse attention on ranks is the same with it."""

from __future__ import annotations

import pytest
import torch

from ringctx import Attention, Layout, ring_attention
from ringctx import patterns as p
from ringctx.core.pattern import CAUSAL, FAR, FULL, PARTIAL, Pattern
from ringctx.core.tiles import tiles
from ringctx.core.together import joined
from ringctx.kernels.native import Native
from ringctx.testing import dense, errors
from tests import virtual
from tests.unit.test_native import CALL

ZIGZAG = ((CAUSAL, 0, 64, 0, 64), (FULL, 64, 128, 0, 64), (CAUSAL, 64, 128, 64, 128))
ALL = (-FAR, FAR)


def together(pattern, rows, queries, keys):
    return joined(pattern, (range(queries),), (range(keys),), rows, 32)


def test_the_rectangle_holds_what_fits_and_the_rest_remains():
    masked = (PARTIAL, 0, 32, 64, 96)
    found, rest = together(p.causal() & p.dilated(2), (*ZIGZAG, masked), 128, 128)
    assert found is not None and (found.queries, found.keys) == ((0, 128), (0, 128)) and rest == (masked,)
    assert found.tiles == ((-FAR, 0, 0, 64, 0, 64), (*ALL, 64, 128, 0, 64), (-FAR, 0, 64, 128, 64, 128))
    assert found.pairs == 3 * 32 * 32 * 2 + 64 * 64


def test_a_rectangle_begins_at_its_own_corner():
    rows = ((FULL, 64, 96, 96, 128), (FULL, 96, 101, 160, 165), (PARTIAL, 64, 96, 128, 160))  # the last borders are the tensors' ends
    found, rest = together(p.band(10, 80), rows, 101, 165)
    moved = ((*ALL, 0, 32, 0, 32), (*ALL, 32, 37, 64, 69), (10 - 32, 80 - 32, 0, 32, 32, 64))
    assert found == ((64, 101), (96, 165), moved, 32) and rest == ()


@pytest.mark.parametrize(
    "rows",
    [
        ZIGZAG[:1],
        ((FULL, 0, 64, 0, 33), (FULL, 64, 128, 33, 128)),
        ((FULL, 0, 16, 0, 64), (FULL, 0, 16, 64, 128)),
        ((FULL, 0, 64, 0, 32), (FULL, 64, 128, 960, 992)),
    ],
    ids=["one", "borders", "few rows", "far apart"],
)
def test_what_is_not_worth_it_stays_apart(rows):
    assert together(p.full(), rows, 128 if rows[0][2] != 16 else 16, 1024) == (None, rows)


@pytest.mark.parametrize(
    "pattern, band",
    [
        (p.causal() & p.window(63), (-62, 0)),
        (p.causal() & p.window(62), None),
        (p.band(-70, 5), (-70, 5)),
        (p.causal() & (p.sinks(3) | p.window(80)), (-79, 0)),
        (p.causal() & p.window(80) & p.documents(cu_seqlens=[0, 300]), (-79, 0)),
        (p.causal() & p.window(80) & p.documents(cu_seqlens=[0, 150, 300]), None),
        (p.causal() & p.window(80) & p.dilated(2), None),
        (~p.window(80), None),
    ],
)
def test_a_masked_tile_is_a_band_where_its_pattern_is_one_wide_enough_for_a_square(pattern, band):
    tile = (PARTIAL, 128, 192, 64, 192)
    found, rest = together(pattern, (tile,), 300, 300)
    if band is None:
        assert found is None and rest == (tile,)
    else:
        assert found == ((128, 192), (64, 192), ((band[0] + 64, band[1] + 64, 0, 64, 0, 128),), 32) and rest == ()


@pytest.mark.parametrize("pattern", [p.causal() & p.window(301), p.band(-400, 211), p.causal()], ids=str)
@pytest.mark.parametrize("queries, keys", [((0, 3), (0, 3)), ((1, 3), (2, 3)), ((2, 4), (1, 4)), ((50, 1), (0, 1)), ((7, 2), (1, 4))])
def test_bands_say_of_every_pair_of_positions_what_the_pattern_says_of_its_indices(pattern, queries, keys):
    (i, j), tile = (range(first, first + 160 * step, step) for first, step in (queries, keys)), (PARTIAL, 32, 160, 64, 128)
    found, rest = joined(pattern, (i,), (j,), (tile,), 32)
    if queries[1] != keys[1]:
        assert found is None and rest == (tile,)
        return
    assert found is not None and rest == ()
    ((low, high, *borders),) = found.tiles
    assert borders == [0, 128, 0, 64]
    ahead = torch.arange(64) - torch.arange(128)[:, None]
    want = pattern.allows(torch.tensor(i)[32:160], torch.tensor(j)[64:128])
    assert torch.equal((ahead >= low) & (ahead <= high), want)


def test_tiles_are_cut_at_the_borders_of_blocks_and_not_of_windows():
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    found = tiles(p.causal() & p.blocks(mask, 128), (range(1024),), (range(1024),))
    assert all(t[0] != PARTIAL for t in found)
    assert sum((t[2] - t[1]) * (t[4] - t[3]) for t in found) == 128**2 * int((mask & torch.ones(8, 8, dtype=torch.bool).tril()).sum())
    ids = p.documents(cu_seqlens=[0, 300, 700, 1024])
    assert sum(t[0] == PARTIAL for t in tiles(p.causal() & ids, (range(1024),), (range(1024),))) == 0
    assert any(t[0] == PARTIAL for t in tiles(p.causal() & p.window(100), (range(1024),), (range(1024),)))


def of_a_rank(ring, layout, attention, whole):
    q, k, v = (layout.shard(x, ring.rank).clone().requires_grad_() for x in whole[:3])
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, return_lse=True)
    slopes = [layout.shard(x, ring.rank) for x in whole[3:]]
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse], (q, k, v), slopes)


def pattern_of(kind: str, n: int) -> Pattern:
    mask = torch.rand(-(-n // 128), -(-n // 128), generator=torch.Generator().manual_seed(1)) < 0.5
    found = {"causal": p.causal(), "blocks": p.causal() & p.blocks(mask, 128), "window": p.causal() & p.window(200)}
    return found.get(kind) or p.causal() & p.documents(cu_seqlens=[0, 160, 448, n])


@pytest.mark.skipif(Native().why_not(CALL) is not None, reason=f"the native kernel {Native().why_not(CALL)}")
@pytest.mark.parametrize("kind", ["causal", "blocks", "window", "documents"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size, n", [(1, 1000), (2, 1024), (3, 777)])
def test_rings_compute_several_tiles_in_one_call(kind, layout, size, n, monkeypatch):
    calls = []
    forward = Native.forward
    monkeypatch.setattr(Native, "forward", lambda *x: calls.append((len(x) == 6, x[4].mask is None)) or forward(*x))
    make = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, n, *x, generator=make).bfloat16() for x in ((4, 64), (2, 64), (2, 64), (4, 64))]
    whole.append(torch.randn(1, n, 4, generator=make))
    shards, attention = getattr(Layout, layout)(n, size), Attention(pattern_of(kind, n))
    parts = virtual.run(of_a_rank, shards, attention, whole, size=size)
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (shards.unshard(list(x)) for x in zip(*parts, strict=True)), strict=True))
    found = errors(dense(attention, *whole[:3], dout=whole[3], dlse=whole[4]), dout=whole[3], **got)
    assert max(found.values()) < 5e-3, found
    if (size, n, layout) == (2, 1024, "zigzag"):
        assert any(several for several, _ in calls)
    if size < 3 and layout != "striped" and kind in ("causal", "window"):
        assert all(unmasked for _, unmasked in calls)
