"""Every kernel against attention's definition, written densely in fp64: masks, widths, groups, dtypes, scores."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ringctx.kernels import TileScores, sdpa
from ringctx.kernels.sdpa import Sdpa
from tests.unit.tiles import KERNELS, LIMITS, REFERENCE, SDPA, Cap, answer, check, dense, error, holes, problem, tile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kind", ["full", "causal", "partial", "heads", "batches", "both"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_equals_the_definition_forward_and_backward(name, kind, dtype):
    k = 37 if kind in ("causal", "both") else 53
    check(KERNELS[name], problem(q=37, k=k, dtype=dtype), tile(kind, 37, k))


@pytest.mark.parametrize("d", [32, 33, 64, 128, 256])
@pytest.mark.parametrize("h, g", [(8, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("name", KERNELS)
def test_widths_and_groups(name, h, g, d):
    check(KERNELS[name], problem(h=h, g=g, d=d, q=19, k=19, dtype=torch.float32), TileScores(d**-0.5, causal=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("dlse", [True, False], ids=["dlse", "no_dlse"])
@pytest.mark.parametrize("d, e", [(32, 48), (48, 32), (16, 17), (33, 1), (1, 5)])
@pytest.mark.parametrize("name", KERNELS)
def test_values_may_be_wider_or_narrower_than_keys(name, d, e, dlse, dtype):
    check(KERNELS[name], problem(d=d, e=e, dtype=dtype), tile("partial", 37, 53), dlse)


@pytest.mark.parametrize("kind", ["full", "causal", "heads"])
@pytest.mark.parametrize("name", KERNELS)
def test_native_half_precision_is_held_to_the_definition_too(monkeypatch, name, kind):
    """On a CPU with bf16 instructions the fused kernels compute in bf16; any CPU can try."""
    monkeypatch.setattr(sdpa, "_compute_dtype", lambda dtype: dtype)
    k = 37 if kind == "causal" else 53
    check(KERNELS[name], problem(q=37, k=k, dtype=torch.bfloat16), tile(kind, 37, k), limit=2e-2)


@pytest.mark.parametrize("kind", ["full", "causal", "partial"])
def test_the_precise_kernel_is_more_exact_in_dk_and_dv(monkeypatch, kind):
    """By 1.4 even here, where bf16 sums are short; at 8,192 tokens by more than 2."""
    monkeypatch.setattr(sdpa, "_compute_dtype", lambda dtype: dtype)
    p = problem(b=1, q=1024, k=1024, h=4, g=1, d=64, dtype=torch.bfloat16)
    mask = (lambda: torch.ones(1, 1, 1024, 1024, dtype=torch.bool)) if kind == "partial" else None
    scores = TileScores(0.125, causal=kind == "causal", mask=mask)
    want = dense(p, scores, dlse=False)
    plain = answer(SDPA, p, scores, dlse=False)
    precise = answer(Sdpa("precise", precise=True), p, scores, dlse=False)
    for n in (3, 4):
        assert error(precise[n], want[n]) * 1.4 <= error(plain[n], want[n])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["full", "causal", "heads"])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_bias_of_any_broadcast_shape_is_added(name, kind, dtype):
    k = 37 if kind == "causal" else 53
    for shape in [(37, k), (4, 37, k), (1, 4, 37, k), (2, 1, 37, k), (1, 1, 1, k), (37, 1), ()]:
        bias = torch.randn((*shape, 2), generator=torch.Generator().manual_seed(3), dtype=dtype)[..., 0]  # strided
        check(KERNELS[name], problem(q=37, k=k, dtype=dtype), dataclasses.replace(tile(kind, 37, k), bias=lambda bias=bias: bias))


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_a_bias_of_minus_infinity_is_a_mask(name):
    bias = torch.zeros(37, 37).masked_fill(~holes(37, 37)[0, 0], -math.inf)
    p = problem(q=37, k=37, dtype=torch.float32)
    for causal in (False, True):
        biased = answer(KERNELS[name], p, TileScores(0.3, causal, bias=lambda: bias))
        masked = answer(KERNELS[name], p, TileScores(0.3, causal, mask=lambda: bias == 0))
        for x, y in zip(biased, masked, strict=True):
            torch.testing.assert_close(x, y)
            assert not x.isnan().any()


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["full", "causal", "batches"])
def test_the_reference_takes_everything_at_once(monkeypatch, kind, dtype, chunk):
    if chunk:
        monkeypatch.setattr("ringctx.kernels.reference.CHUNK_ROWS", chunk)
    k = 37 if kind == "causal" else 53
    make = torch.Generator().manual_seed(5)
    bias = torch.randn(4, 37, k, generator=make, dtype=torch.float64)
    kept = (torch.rand(2, 4, 37, k, generator=make) > 0.3) / 0.7
    seen = []
    scores = dataclasses.replace(
        tile(kind, 37, k), elementwise=(Cap(), Cap()), bias=lambda: bias, keep=lambda: kept, bias_grad=lambda x: seen.append(x.clone())
    )
    p = problem(q=37, k=k, e=40, dtype=dtype)
    check(REFERENCE, p, scores)
    assert len(seen) == 1
    assert error(seen[0], dense(p, scores)[5]) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_where_a_row_sees_one_key_its_gradient_is_exactly_zero(dtype):
    p = problem(q=1, k=1, dtype=dtype)
    for keep in (None, lambda: torch.full((2, 4, 1, 1), 1 / 0.7, dtype=dtype)):
        out, _, dq, dk, dv = answer(REFERENCE, p, TileScores(0.3, keep=keep), dlse=False)
        assert out.any() and dv.any() and not dq.any() and not dk.any()


def test_a_small_tile_with_dropout_is_the_definition():
    kept = (torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(5)) > 0.3) / 0.7
    check(REFERENCE, problem(q=5, k=7), TileScores(0.3, keep=lambda: kept))


def test_the_reference_holds_few_logits_at_a_time(monkeypatch):
    monkeypatch.setattr("ringctx.kernels.reference.CHUNK_LOGITS", 2 * 4 * 53 * 3)
    from ringctx.kernels.reference import _Tile

    p = problem()
    assert {s.stop - s.start for s in _Tile(p.q, p.k, TileScores(1.0)).chunks()} == {3, 1}
    check(REFERENCE, p, tile("partial", 37, 53))


def test_autocast_does_not_reach_into_the_reference():
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(REFERENCE, p, TileScores(0.3))
        check(SDPA, p, TileScores(0.3))


@pytest.mark.parametrize("name", KERNELS)
def test_parts_of_a_row_add_up_to_the_row(name):
    """Backward gets the whole row's out and lse: keys seen in two tiles give the gradients of one, rows dead in one tile included."""
    p = problem(k=64)
    seen = holes(37, 64)[0, 0]
    seen[3, :32] = False
    whole = TileScores(0.3, mask=lambda: seen)
    want = dense(p, whole)
    lse = want[1].masked_fill(want[1] == -math.inf, 0.0)
    parts = []
    for half in (slice(0, 32), slice(32, 64)):
        scores = TileScores(0.3, mask=lambda half=half: seen[:, half])
        parts.append(KERNELS[name].backward(p.dout, p.q, p.k[:, half], p.v[:, half], want[0], lse, scores, p.dlse))
    assert error(parts[0][0] + parts[1][0], want[2]) < 1e-13
    assert error(torch.cat([parts[0][1], parts[1][1]], 1), want[3]) < 1e-13
    assert error(torch.cat([parts[0][2], parts[1][2]], 1), want[4]) < 1e-13
