"""The CUDA kernels as far as a machine without a GPU can try them: signatures, shapes, masks and algebra."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ringctx.kernels import Call, TileScores, flash
from ringctx.kernels.flash import GENERATIONS, Flash
from ringctx.kernels.reference import Reference
from ringctx.kernels.sdpa import Sdpa
from tests.unit.tiles import answer, dense, error, problem, tile

CALL = Call(device="cuda", dtype=torch.bfloat16, h=4, g=2, d=32, e=32)

# Parameter lists of flash-attn 2.8.3, of its hopper folder, and of flash-attn-4 4.0.0b36 (its tuning parameters left out).
FORWARD_2 = "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes return_softmax"
BACKWARD_2 = (
    "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "deterministic rng_state=None"
)
FORWARD_3 = (
    "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table "
    "kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale causal window_size=(-1,-1) "
    "attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=1 pack_gqa=None sm_margin=0"
)
BACKWARD_3 = (
    "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv softmax_scale causal "
    "window_size=(-1,-1) softcap=0.0 deterministic=False sm_margin=0"
)
FORWARD_4 = "q k v qv=None softmax_scale=None causal=False softcap=None return_lse=False out=None lse=None"
BACKWARD_4 = "q k v out dout lse softmax_scale=None causal=False softcap=0.0 dq=None dk=None dv=None dlse=None"


def with_signature(text, body):
    """A function of this parameter list that calls body with its arguments by name."""
    space: dict = {}
    exec(f"def stub({', '.join(text.split())}): return body(**locals())", {"body": body}, space)
    return space["stub"]


def plain(arguments):
    """The features that ringctx leaves off are off."""
    for off in ("dropout_p", "softcap", "attention_chunk", "sm_margin"):
        assert not arguments.get(off)
    for absent in ("alibi_slopes", "k_new", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "page_table", "q_descale", "qv", "rng_state"):
        assert arguments.get(absent) is None
    assert arguments.get("window_size_left", -1) == arguments.get("window_size_right", -1) == -1
    assert arguments.get("window_size", (-1, -1)) == (-1, -1)


def stub_forward(**a):
    plain(a)
    assert a["q"].shape[-1] == a["k"].shape[-1] == a["v"].shape[-1] and a["q"].shape[-1] % 8 == 0
    out, lse = Reference().forward(a["q"], a["k"], a["v"], TileScores(a["softmax_scale"], a["causal"]))
    return out.to(a["q"].dtype), lse.transpose(1, 2).contiguous(), None, None


def stub_backward(**a):
    plain(a)
    assert a["q"].shape[-1] == a["v"].shape[-1] == a["dout"].shape[-1] <= 256 and a["q"].shape[-1] % 8 == 0
    lse = a.get("softmax_lse", a.get("lse"))
    assert lse.is_contiguous() and lse.shape == (a["q"].shape[0], a["q"].shape[2], a["q"].shape[1])
    assert a["out"].dtype == a["dout"].dtype == a["q"].dtype
    dlse = a.get("dlse")
    scores = TileScores(a["softmax_scale"], a["causal"])
    dlse = None if dlse is None else dlse.transpose(1, 2)
    grads = Reference().backward(a["dout"], a["q"], a["k"], a["v"], a["out"], lse.transpose(1, 2), scores, dlse)
    if a.get("dq") is None:
        return grads
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        a[name].copy_(grad)
    return None


@pytest.fixture(params=[2, 3, 4])
def generation(request, monkeypatch):
    """flash-attn of one generation, with real signatures and the reference inside, on a GPU that it fits."""
    signatures = {2: (FORWARD_2, BACKWARD_2), 3: (FORWARD_3, BACKWARD_3), 4: (FORWARD_4, BACKWARD_4)}[request.param]
    names = ("_flash_attn_fwd", "_flash_attn_bwd") if request.param == 4 else ("_flash_attn_forward", "_flash_attn_backward")
    found = next(g for g in GENERATIONS if type(g).__name__ == f"Flash{request.param}")
    module = types.ModuleType(found.module)
    for name, text, body in zip(names, signatures, (stub_forward, stub_backward), strict=True):
        setattr(module, name, with_signature(text, body))
    parent = found.module.split(".")[0]
    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    if request.param == 4:
        monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, found.module, module)
    monkeypatch.setattr(flash, "_major", lambda: 9)
    return found


@pytest.mark.parametrize("dlse", [True, False], ids=["dlse", "no_dlse"])
@pytest.mark.parametrize("d, e", [(32, 32), (33, 20), (24, 40), (128, 128), (256, 256)])
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_flash_attn_is_called_by_its_signature_and_answers_rightly(generation, kind, d, e, dlse):
    if max(d, e) > generation.widest:
        reason = f"{type(generation).__name__}: at most {generation.widest} wide"
        assert reason in str(Flash().why_not(replace(CALL, dtype=torch.float16, d=d, e=e)))
        return
    k = 21 if kind == "causal" else 27
    p, scores = problem(q=21, k=k, d=d, e=e, dtype=torch.float16), tile(kind, 21, k, scale=d**-0.5)
    got, want = answer(Flash(), p, scores, dlse), dense(p, scores, dlse)
    for x, y in zip(got, want, strict=False):
        assert x.shape == y.shape
        assert error(x, y) < 2e-3
    assert got[1].dtype == torch.float32


def test_flash_refuses_with_each_generations_reason(generation, monkeypatch):
    assert Flash().why_not(CALL) is None
    wide = Call(device="cuda", dtype=torch.bfloat16, h=4, g=2, d=320, e=32)
    assert f"{type(generation).__name__}: at most {generation.widest} wide" in str(Flash().why_not(wide))
    monkeypatch.setattr(flash, "_major", lambda: 7)
    assert f"{type(generation).__name__}: has no kernels for compute capability 7" in str(Flash().why_not(CALL))


def test_the_stubs_signatures_are_the_installed_ones():
    """Where a flash-attn is installed, its parameters begin like the stub's."""
    module = pytest.importorskip("flash_attn.flash_attn_interface", reason="flash-attn is not installed", exc_type=ImportError)
    for name, text in (("_flash_attn_forward", FORWARD_2), ("_flash_attn_backward", BACKWARD_2)):
        wanted = list(inspect.signature(with_signature(text, dict)).parameters)
        assert list(inspect.signature(getattr(module, name)).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize("d, e", [(64, 64), (33, 20), (24, 40), (256, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes_and_dtypes_of_torchs_cuda_flash_kernel(causal, d, e):
    with FakeTensorMode():
        q = torch.empty(2, 48, 8, d, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(2, 48, 2, d, dtype=torch.bfloat16, device="cuda")
        v = torch.empty(2, 48, 2, e, dtype=torch.bfloat16, device="cuda")
        scores = TileScores(0.1, causal)
        out, lse = Sdpa().forward(q, k, v, scores)
        assert out.shape == (2, 48, 8, e) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        assert lse.shape == (2, 48, 8) and lse.dtype == torch.float32
        for dlse in (None, lse):
            grads = Sdpa().backward(torch.empty_like(out), q, k, v, out, lse, scores, dlse)
            assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_torchs_cuda_flash_kernel_needs_a_gpu_it_fits(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert Sdpa().why_not(CALL) == "this build of torch has no CUDA flash kernel"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0" in str(Sdpa().why_not(CALL))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert Sdpa().why_not(CALL) is None
