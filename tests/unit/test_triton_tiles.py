"""Triton's kernels for any tile: in Triton's interpreter against attention's definition, and compiled for GPUs that are not there."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ringctx.kernels import Call, TileScores, choose
from ringctx.kernels.triton_blocks import why_not
from ringctx.kernels.triton_tiles import Triton
from tests.unit.machine import Machine
from tests.unit.tiles import answer, check, dense, error, holes, problem, tile

triton = pytest.importorskip("triton", reason="Triton is not installed; run `make triton`")
interpreted = pytest.mark.skipif(why_not("cpu", torch.float32) is not None, reason="Triton's interpreter is off; run `make triton`")
KERNEL = Triton()


def scored(kind: str, q: int, k: int, h: int = 4, grads: list | None = None) -> TileScores:
    """A tile with a bias, whose gradient is kept in `grads`, or with dropout, or both."""
    make = torch.Generator().manual_seed(2)
    bias = torch.randn(1, h, q, k, generator=make)
    kept = (torch.rand(2, h, q, k, generator=make) < 0.7).float() / 0.7
    return TileScores(
        0.3,
        causal=kind == "causal",
        mask=(lambda: holes(q, k)[0, 0]) if kind == "all" else None,
        bias=lambda: bias,
        bias_grad=None if grads is None else grads.append,
        keep=(lambda: kept) if kind in ("dropout", "all") else None,
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kind", ["full", "causal", "partial", "heads", "batches", "both"])
def test_equals_the_definition_forward_and_backward(kind, dtype):
    k = 37 if kind in ("causal", "both") else 53
    check(KERNEL, problem(q=37, k=k, dtype=dtype), tile(kind, 37, k))


@interpreted
@pytest.mark.parametrize("d, e", [(32, 48), (48, 32), (16, 17), (33, 1), (1, 5), (128, 128)])
@pytest.mark.parametrize("h, g", [(4, 1), (3, 3)])
def test_widths_and_groups(h, g, d, e):
    check(KERNEL, problem(h=h, g=g, d=d, e=e, q=70, k=70, b=1, dtype=torch.float32), TileScores(d**-0.5, causal=True))


@interpreted
@pytest.mark.parametrize("kind", ["bias", "causal", "dropout", "all"])
def test_bias_and_its_gradient_and_dropout(kind):
    grads: list = []
    p, scores = problem(q=37, k=37, dtype=torch.float32), scored(kind, 37, 37, grads=grads)
    got, want = answer(KERNEL, p, scores), dense(p, scores)
    for x, y in zip((*got, grads[0]), want, strict=True):
        assert error(x, y) < 2e-6


@interpreted
def test_it_takes_what_the_fused_kernels_refuse(monkeypatch):
    choose.cache_clear()
    call = functools.partial(Call, device="cpu", dtype=torch.float32, h=4, g=2, d=32, e=32)
    assert choose(call(dropout=True)).name == choose(call(bias=True, bias_grad=True)).name == "triton"
    assert choose(call(elementwise=True)).name == "reference"
    choose.cache_clear()


@pytest.mark.skipif(why_not("cpu", torch.float32) is None, reason="Triton's interpreter is on, which compiles nothing")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("capability, shared", [(80, 166_912), (90, 232_448)])
@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 256), (torch.float32, 128)])
def test_every_launch_compiles_for_a_gpu_and_fits_its_shared_memory(monkeypatch, capability, shared, dtype, d):
    """Triton itself refuses a kernel that wants more shared memory than the machine has."""
    machine = Machine(capability, shared)
    monkeypatch.setattr(triton.runtime.driver, "_active", machine)
    with FakeTensorMode():
        empty = functools.partial(torch.empty, device="cuda")
        q, k, v = (empty(2, 200, heads, d, dtype=dtype) for heads in (4, 2, 2))
        mask, pairs = empty(200, 200, dtype=torch.bool), empty(2, 4, 200, 200)
        plain = TileScores(0.1, causal=True)
        full = TileScores(0.1, mask=lambda: mask, bias=lambda: pairs, bias_grad=lambda x: None, keep=lambda: pairs)
        for scores in (plain, full):
            out, lse = KERNEL.forward(q, k, v, scores)
            assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (2, 200, 4), torch.float32)
            grads = KERNEL.backward(out, q, k, v, out, lse, scores, lse)
            assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and {x.dtype for x in grads} == {torch.float32}
    assert set(machine.kernels) == {"_attend", "_queries_back", "_keys_back"}
