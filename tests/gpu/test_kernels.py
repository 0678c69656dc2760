"""Every kernel that takes CUDA tensors against attention's definition in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ringctx.kernels import Call, TileScores, choose
from ringctx.kernels.flash import GENERATIONS, Flash
from ringctx.kernels.registry import REGISTRY
from tests.unit.test_triton_tiles import scored
from tests.unit.tiles import LIMITS, Cap, answer, dense, error, problem, tile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
HALF = [torch.bfloat16, torch.float16]
SHAPES = {"small": (37, 53), "blocks": (300, 300), "long": (1024, 2048)}


def on_gpu(scores: TileScores) -> TileScores:
    """The same tile, its planes on the GPU."""
    moved = {
        name: (lambda make=getattr(scores, name): make().cuda()) for name in ("mask", "bias", "keep") if getattr(scores, name) is not None
    }
    return dataclasses.replace(scores, **moved)


def check(kernel, p, scores, dlse=True, more=()):
    """out, lse, dq, dk, dv, and then what `more` holds, within the dtype's limit."""
    want = dense(p, scores, dlse)
    got = [x.cpu() for x in (*answer(kernel, p.to("cuda"), on_gpu(scores), dlse), *more)]
    found = {name: error(x, y) for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dbias"), got, want, strict=False)}
    assert max(found.values()) <= LIMITS[p.q.dtype], found


def takes(kernel, p, scores):
    """Skip what the kernel refuses."""
    (h, d), (g, e) = p.q.shape[2:], p.v.shape[2:]
    call = Call(
        "cuda", p.q.dtype, h, g, d, e, causal=scores.causal, mask=scores.mask is not None, bias=scores.bias is not None,
        bias_grad=scores.bias_grad is not None, dropout=scores.keep is not None, elementwise=bool(scores.elementwise), backward=True,
    )  # fmt: skip
    reason = kernel.why_not(call)
    if reason is not None:
        pytest.skip(f"{kernel.name}: {reason}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["full", "causal", "partial", "heads", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kernel", REGISTRY, ids=lambda x: x.name)
def test_equals_the_definition(kernel, dtype, kind, shape):
    q, k = SHAPES[shape]
    k = q if kind in ("causal", "both") else k
    p, scores = problem(q=q, k=k, dtype=dtype), tile(kind, q, k)
    takes(kernel, p, scores)
    check(kernel, p, scores)


@pytest.mark.parametrize("dlse", [True, False], ids=["dlse", "no_dlse"])
@pytest.mark.parametrize("d, e", [(32, 48), (33, 20), (64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("h, g", [(8, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("kernel", REGISTRY, ids=lambda x: x.name)
def test_widths_groups_and_the_gradient_of_lse(kernel, h, g, d, e, dlse):
    p, scores = problem(b=1, h=h, g=g, d=d, e=e, q=130, k=130, dtype=torch.bfloat16), TileScores(d**-0.5, causal=True)
    takes(kernel, p, scores)
    check(kernel, p, scores, dlse)


@pytest.mark.parametrize("kind", ["bias", "causal", "dropout", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("kernel", REGISTRY, ids=lambda x: x.name)
def test_bias_its_gradient_and_dropout(kernel, dtype, kind):
    grads: list = []
    p, scores = problem(q=70, k=70, dtype=dtype), scored(kind, 70, 70, grads=grads)
    takes(kernel, p, scores)
    check(kernel, p, scores, more=grads)


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("d", [64, 128])
def test_each_generation_of_flash_attn_that_is_installed(monkeypatch, generation, kind, d):
    monkeypatch.setattr("ringctx.kernels.flash.GENERATIONS", (generation,))
    p, scores = problem(q=300, k=300, d=d, dtype=torch.bfloat16), tile(kind, 300, 300)
    takes(Flash(), p, scores)
    check(Flash(), p, scores, dlse=False)
    check(Flash(), p, scores)


def test_what_auto_chooses_here():
    choose.cache_clear()
    call = Call("cuda", torch.bfloat16, h=8, g=2, d=64, e=64, causal=True, backward=True)
    assert choose(call).name in ("flash", "sdpa")
    assert choose(dataclasses.replace(call, causal=False, mask=True)).name == "triton"
    assert choose(dataclasses.replace(call, dropout=True)).name == "triton"
    assert choose(dataclasses.replace(call, elementwise=True)).name == "reference"


def test_elementwise_scores_are_the_references():
    check(next(k for k in REGISTRY if k.name == "reference"), problem(dtype=torch.float32), TileScores(0.3, elementwise=(Cap(),)))
