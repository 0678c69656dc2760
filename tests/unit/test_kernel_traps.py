"""Every known trap of the fused kernels: rows that see nothing, empty tiles, strides, poison, late keys, odd causal tiles."""

from __future__ import annotations

import math

import pytest
import torch

from ringctx.errors import ConfigError
from ringctx.kernels import REGISTRY, TileScores, sdpa, tricks
from tests.unit.tiles import KERNELS, REFERENCE, Problem, answer, check, dense, error, holes, problem, tile


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("name", KERNELS)
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(name, dtype):
    p = problem(dtype=dtype)
    seen = torch.ones(2, 4, 37, 53, dtype=torch.bool)
    seen[1, 2, 7:30] = False
    scores = TileScores(0.3, mask=lambda: seen)
    out, lse, dq, _, _ = answer(KERNELS[name], p, scores)
    assert torch.equal(out[1, 7:30, 2], torch.zeros_like(out[1, 7:30, 2]))
    assert (lse[1, 7:30, 2] == -math.inf).all()
    assert torch.equal(dq[1, 7:30, 2], torch.zeros_like(dq[1, 7:30, 2]))
    assert torch.isfinite(lse).sum() == lse.numel() - 23


@pytest.mark.parametrize("name", KERNELS)
def test_a_tile_that_shows_nothing_at_all(name):
    p = problem(dtype=torch.float32)
    for x, limit in zip(
        answer(KERNELS[name], p, TileScores(0.3, mask=lambda: torch.zeros(37, 53, dtype=torch.bool))), (0, -math.inf, 0, 0, 0), strict=True
    ):
        assert (x == limit).all()


@pytest.mark.parametrize("name", KERNELS)
def test_lse_of_minus_infinity_in_backward_is_no_nan(name):
    p = problem(dtype=torch.float32)
    scores = tile("partial", 37, 53)
    out, lse = KERNELS[name].forward(p.q, p.k, p.v, scores)
    assert (lse == -math.inf).any()
    for got, want in zip(KERNELS[name].backward(p.dout, p.q, p.k, p.v, out, lse, scores, p.dlse), dense(p, scores)[2:], strict=False):
        assert error(got, want) < 2e-6


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("q, k, b", [(0, 5, 1), (5, 0, 1), (0, 0, 1), (3, 3, 0)])
def test_empty_tiles_do_not_kill_the_process(name, q, k, b):
    p = problem(q=q, k=k, b=b, dtype=torch.float32)
    out, lse, dq, dk, dv = answer(KERNELS[name], p, TileScores(0.3))
    assert out.shape == p.dout.shape and (out == 0).all() and (lse == -math.inf).all()
    assert dq.shape == p.q.shape and dk.shape == p.k.shape and dv.shape == p.v.shape
    assert all((x == 0).all() for x in (dq, dk, dv))


def strided(x, how):
    if how == "last":
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]
    if how == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 3, 5), value=math.nan)[:, 3:-5]  # poison before and after each batch's rows


@pytest.mark.parametrize("how", ["last", "heads_first", "poisoned"])
@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("name", KERNELS)
def test_strides_are_read_rightly_and_no_poison_leaks_in(name, kind, how):
    p = problem(dtype=torch.float32)
    odd = Problem(*(strided(getattr(p, n), how) for n in ("q", "k", "v", "dout")), p.dlse)
    assert not odd.k.is_contiguous()
    scores = tile(kind, 37, 53)
    for got, want in zip(answer(KERNELS[name], odd, scores), dense(p, scores), strict=False):
        assert error(got, want) < 2e-6


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", KERNELS)
def test_lse_and_out_may_be_strided_in_backward(name, stride):
    p = problem(dtype=torch.float32)
    want = dense(p, TileScores(0.3))
    out = torch.stack([want[0].float()] * 2, -1)[..., 0]
    lse = want[1].float().transpose(1, 2).contiguous().transpose(1, 2) if stride == 1 else torch.stack([want[1].float()] * 2, -1)[..., 0]
    for got, grad in zip(KERNELS[name].backward(p.dout, p.q, p.k, p.v, out, lse, TileScores(0.3), p.dlse), want[2:], strict=False):
        assert error(got, grad) < 2e-6


@pytest.mark.parametrize("name", KERNELS)
def test_a_mask_of_any_broadcast_shape_and_stride(name):
    p = problem(dtype=torch.float32)
    big = holes(37, 106, 4, 2)
    for seen in [big[..., ::2], big[..., :53], big[:1, :1, :, :1], big[:, :1, :1, :53], big[0, 0, 0, :53], big[0, :, :, :53]]:
        check(KERNELS[name], p, TileScores(0.3, mask=lambda seen=seen: seen))


@pytest.mark.parametrize("name", KERNELS)
def test_keys_first_seen_late_in_the_row(name):
    """aten walks the keys in blocks of 512: whole blocks unseen must not turn into NaN."""
    p = problem(b=1, q=40, k=1100, h=2, g=1, dtype=torch.float32)
    seen = torch.zeros(40, 1100, dtype=torch.bool)
    seen[1::2, 1040:] = True
    check(KERNELS[name], p, TileScores(0.3, mask=lambda: seen))


@pytest.mark.parametrize("kernel", REGISTRY, ids=lambda x: x.name)
def test_a_causal_tile_is_square(kernel):
    p = problem(dtype=torch.float32)
    with pytest.raises(ConfigError, match="37 queries and 53 keys"):
        kernel.forward(p.q, p.k, p.v, TileScores(0.3, causal=True))
    with pytest.raises(ConfigError, match="give it a mask instead"):
        kernel.backward(p.dout, p.q, p.k, p.v, p.dout, p.dlse, TileScores(0.3, causal=True))


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_large_logits_do_not_overflow(name):
    p = problem(dtype=torch.float32)
    p.q *= 300
    check(KERNELS[name], p, TileScores(1.0), limit=2e-4)


def test_kernels_record_nothing_for_autograd():
    p = problem(dtype=torch.float32)
    for kernel in KERNELS.values():
        out, lse = kernel.forward(p.q.requires_grad_(), p.k, p.v, TileScores(0.3))
        assert not out.requires_grad and not lse.requires_grad


def test_half_precision_is_computed_in_fp32_where_the_cpu_lacks_it(monkeypatch):
    for native, want in [(False, torch.float32), (True, torch.bfloat16)]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert sdpa._compute_dtype(torch.bfloat16) == want
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    assert sdpa._compute_dtype(torch.float16) == torch.float32
    assert sdpa._compute_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("causal", [False, True])
def test_the_precise_kernels_pieces_cover_the_tile_once(causal):
    seen = torch.zeros(50, 50, dtype=torch.int)
    for rows, keys, is_causal in sdpa._pieces(50, 50, 16, causal):
        piece = torch.ones(50, 50, dtype=torch.int)[rows, keys]
        seen[rows, keys] += piece.tril() if is_causal else piece
    assert torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))


def test_where_no_column_is_left_dlse_gets_a_call_of_its_own():
    p = problem(d=32, e=32)
    widths = []

    def run(dout, q, k, v, out):
        widths.append(q.shape[-1])
        assert len({x.shape[-1] for x in (dout, q, k, v, out)}) == 1
        return REFERENCE.backward(dout, q, k, v, out, lse, TileScores(0.3))

    out, lse, *grads = dense(p, TileScores(0.3))
    got = tricks.padded_backward(run, p.dout, p.q, p.k, p.v, out, p.dlse, multiple=8, widest=32)
    assert widths == [32, 32]
    for x, y in zip(got, grads, strict=False):
        assert error(x, y) < 1e-13
