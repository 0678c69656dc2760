"""The native kernel: every shape against float64, what it refuses and why, and how it is compiled and kept."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ringctx.core.pattern import FAR
from ringctx.errors import ConfigError
from ringctx.kernels import native
from ringctx.kernels.base import Call, TileScores
from ringctx.kernels.native import Native
from ringctx.kernels.reference import Reference
from ringctx.kernels.registry import choose

CALL = Call("cpu", torch.bfloat16, 4, 2, 64, 64)


@dataclass(frozen=True)
class Unit:
    """What multiplies, numbers of which dtype, and how far out and gradients may be off.

    large: times as far, where logits are hundreds, whose own rounding in fp32 shows beside float32's alone. rising: where they are 1,000.
    """

    name: str
    dtype: torch.dtype
    out: float
    grads: float
    large: float
    rising: float


POSSIBLE = [
    Unit("avx512", torch.float32, 1e-6, 1e-6, 6.0, 3e-4),
    Unit("avx512-bf16", torch.bfloat16, 2.5e-3, 3e-3, 1.0, 8e-3),
    *([Unit("amx-bf16", torch.bfloat16, 2.5e-3, 3e-3, 1.0, 8e-3)] if torch.cpu._is_amx_tile_supported() else []),
]
UNITS = [unit for unit in POSSIBLE if Native().why_not(replace(CALL, dtype=unit.dtype)) is None]
HERE = pytest.mark.skipif(not UNITS, reason=f"the native kernel {Native().why_not(replace(CALL, dtype=torch.float32))}")


@pytest.fixture(params=UNITS or POSSIBLE[:1], ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Unit:
    """Each unit that this machine has; bfloat16 in AVX-512's registers also where there is AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param.name.startswith("amx"))
    return request.param


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """No test finds what another one has loaded."""
    native.library.cache_clear()
    choose.cache_clear()
    yield
    native.library.cache_clear()
    choose.cache_clear()


def drawn(dtype: torch.dtype, b: int, s: int, n: int, h: int, g: int, d: int, e: int) -> list[Tensor]:
    """q, k, v, dout of that dtype, and dlse."""
    make = torch.Generator().manual_seed(s * 7 + n)
    q, k, v, dout = (torch.randn(b, *x, generator=make).to(dtype) for x in ((s, h, d), (n, g, d), (n, g, e), (s, h, e)))
    return [q, k, v, dout, torch.randn(b, s, h, generator=make)]


def definition(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, causal: bool, scale: float) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    share = q.shape[2] // k.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", leaves[0], leaves[1].repeat_interleave(share, 2)) * scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    out = torch.einsum("bhij,bjhe->bihe", logits.softmax(-1), leaves[2].repeat_interleave(share, 2))
    lse = logits.logsumexp(-1).transpose(1, 2)
    torch.autograd.backward([out, lse], [dout.double(), torch.zeros_like(lse) if dlse is None else dlse.double()])
    return [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


SHAPES = {
    "one block": (1, 32, 32, 1, 1, 32, 32),
    "odd": (2, 333, 333, 6, 2, 64, 64),
    "longer than a run": (1, 700, 700, 2, 1, 64, 64),
    "widths": (1, 97, 97, 4, 2, 128, 96),
    "widest": (1, 65, 65, 2, 2, 256, 256),
    "few keys": (1, 300, 5, 2, 2, 64, 64),
    "many keys": (1, 40, 1_029, 3, 3, 64, 32),
}


@HERE
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_attention_within_the_rounding_of_its_factors(unit: Unit, shape: tuple[int, ...], causal: bool) -> None:
    q, k, v, dout, dlse = drawn(unit.dtype, *shape)
    if causal and q.shape[1] != k.shape[1]:
        with pytest.raises(ConfigError, match="A causal tile is square"):
            Native().forward(q, k, v, TileScores(0.1, causal=True))
        return
    scores = TileScores(q.shape[3] ** -0.5, causal=causal)
    want = definition(q, k, v, dout, dlse, causal, scores.scale)
    out, lse = Native().forward(q, k, v, scores)
    assert out.dtype == lse.dtype == torch.float32
    assert off(out, want[0]) < unit.out and float((lse - want[1]).abs().max()) < 1e-5
    grads = Native().backward(dout, q, k, v, want[0].to(unit.dtype), lse, scores, dlse)
    for got, wanted in zip(grads, want[2:], strict=True):
        assert got.dtype == torch.float32 and off(got, wanted) < unit.grads


@HERE
@pytest.mark.parametrize("kind", ["mask", "mask of heads", "bias", "causal and bias", "rows that see nothing"])
@pytest.mark.parametrize(("s", "n"), [(333, 333), (70, 530)])
def test_masks_and_biases_are_added_and_rows_that_see_nothing_are_0(unit: Unit, kind: str, s: int, n: int) -> None:
    q, k, v, dout, dlse = drawn(unit.dtype, 2, s, n, 4, 2, 64, 64)
    make = torch.Generator().manual_seed(5)
    mask = torch.rand(*((4,) if kind == "mask of heads" else ()), s, n, generator=make) < 0.3
    mask[..., 0] = True
    if kind == "rows that see nothing":
        mask[..., 3:40, :] = False
        mask[..., 50:60, : n // 2] = False  # these see nothing for long
    causal, bias = kind == "causal and bias" and s == n, torch.randn(2, 1, s, n, generator=make)
    masks, biases = "mask" in kind or "rows" in kind, "bias" in kind
    scores = TileScores(0.125, causal=causal, mask=(lambda: mask) if masks else None, bias=(lambda: bias) if biases else None)
    added = (bias if biases else torch.zeros(())) + (torch.where(mask, 0.0, -math.inf) if masks else 0.0)
    seen = (added > -math.inf).expand(2, 4, s, n).any(-1).transpose(1, 2)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    logits = torch.einsum("bihd,bjhd->bhij", leaves[0], leaves[1].repeat_interleave(2, 2)) * 0.125 + added
    if causal:
        logits = logits.masked_fill(torch.ones(s, n, dtype=torch.bool).triu(1), -math.inf)
    logits = logits.masked_fill(~seen.transpose(1, 2)[..., None], -1e9)
    weights = logits.softmax(-1) * seen.transpose(1, 2)[..., None]
    want = torch.einsum("bhij,bjhe->bihe", weights, leaves[2].repeat_interleave(2, 2))
    lse = logits.logsumexp(-1).transpose(1, 2)
    torch.autograd.backward([want, lse], [dout.double(), dlse.double() * seen])
    out, got = Native().forward(q, k, v, scores)
    assert off(out, want.detach()) < unit.out and not out[~seen].any() and bool((got[~seen] == -math.inf).all())
    assert float((got[seen] - lse.detach()[seen]).abs().max()) < 1e-5
    grads = Native().backward(dout, q, k, v, want.detach().to(unit.dtype), got, scores, dlse * seen)
    for mine, leaf in zip(grads, leaves, strict=True):
        assert leaf.grad is not None and off(mine, leaf.grad) < unit.grads


@HERE
def test_tensors_may_be_strided_and_logits_large(unit: Unit) -> None:
    q, k, v, dout, _ = drawn(unit.dtype, 1, 200, 200, 4, 2, 64, 64)
    q, k = 30 * q, k + 3
    scores = TileScores(0.125, causal=True)
    want = definition(q, k, v, dout, None, True, 0.125)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    padded = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    for some in (strided, padded):
        out, lse = Native().forward(*some, scores)
        assert off(out, want[0]) < unit.large * unit.out and off(lse, want[1]) < 1e-5
        assert off(Native().backward(dout, *some, want[0].to(unit.dtype), lse, scores)[2], want[4]) < unit.large * unit.grads


@HERE
@pytest.mark.parametrize("step", [20.0, 60.0, 200.0])
def test_logits_that_rise_along_the_keys_change_the_unit_of_their_row(unit: Unit, step: float) -> None:
    """Every 256 keys are `step` above those before: more than weights may add up to in one unit, and at last more than fp32 holds."""
    q, k, v, dout, dlse = drawn(unit.dtype, 1, 96, 1_500, 2, 2, 64, 64)
    q[..., 0], k[..., 0] = 8.0, (torch.arange(1_500) // 256 * step).to(unit.dtype)[None, :, None]
    want = definition(q, k, v, dout, dlse, False, 0.125)
    kernel, scores = Native(), TileScores(0.125)
    out, lse = kernel.forward(q, k, v, scores)
    grads = kernel.backward(dout, q, k, v, out, lse, scores, dlse)
    assert off(lse, want[1]) < 1e-6
    assert max(off(got, one) for got, one in zip((out, *grads), (want[0], *want[2:]), strict=True)) < unit.rising


@HERE
def test_any_number_of_threads_says_the_same_and_few_queries_go_to_aten(unit: Unit) -> None:
    q, k, v, dout, _ = drawn(unit.dtype, 2, 260, 260, 4, 2, 64, 64)
    scores, before = TileScores(0.125, causal=True), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out, lse = Native().forward(q, k, v, scores)
        found.append([out, lse, *Native().backward(dout, q, k, v, out.to(unit.dtype), lse, scores)])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    few, _ = Native().forward(q[:, :3], k, v, TileScores(0.125))
    assert few.dtype == unit.dtype and few.shape == (2, 3, 4, 64)


@HERE
def test_nan_and_inf_stay_in_their_rows(unit: Unit) -> None:
    q, k, v, _, _ = drawn(unit.dtype, 1, 64, 64, 2, 2, 64, 64)
    q[0, 5, 0, 3] = torch.nan
    out, _ = Native().forward(q, k, v, TileScores(0.125))
    assert out[0, 5, 0].isnan().all() and not out[0, 6:].isnan().any() and not out[0, :, 1].isnan().any()
    v[0, 9, 1, 0] = torch.inf
    out, _ = Native().forward(q, k, v, TileScores(0.125))
    assert not out[0, 7, 1, 0].isfinite() and out[0, 7, 1, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"device": "cuda:0"}, "computes on CPUs only"),
        ({"dtype": torch.float16}, "computes bfloat16 and float32 only"),
        ({"elementwise": True}, "knows no elementwise scores"),
        ({"dropout": True}, "knows no dropout"),
        ({"bias_grad": True}, "knows no gradients of a bias"),
        ({"d": 80}, "widths that are multiples of 32 up to 256"),
        ({"e": 288}, "widths that are multiples of 32 up to 256"),
    ],
)
def test_what_it_does_not_take_says_why(more: dict[str, object], reason: str) -> None:
    said = Native().why_not(replace(CALL, **more))
    assert said is not None and reason in said


def test_machines_without_instructions_or_a_compiler_say_so_and_aten_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    single = replace(CALL, dtype=torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert Native().why_not(CALL) == "needs a CPU with AVX512-BF16 for bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert Native().why_not(single) == "needs a CPU with AVX-512"
    assert choose(CALL).name == choose(single).name == "sdpa"
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in str(Native().why_not(single))
    native.library.cache_clear()
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/false")
    assert "was not compiled by /bin/false" in str(Native().why_not(single))


@HERE
def test_it_is_compiled_once(unit: Unit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library(unit.dtype)[1] is None
    (made,) = (tmp_path / "ringctx").iterdir()
    assert made.name.startswith("native-") and made.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: "compiled again")
    assert native.library(unit.dtype)[1] is None


def test_dtypes_and_kinds_of_cpus_share_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(native, "_compile", lambda command, file: made.append((file, "-mamx-tile" in command)) or "not made here")
    made: list[tuple[Path, bool]] = []
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        native.library.cache_clear()
        assert native.library(torch.bfloat16) == native.library(torch.float32) == (None, "not made here")
    assert [amx for _, amx in made] == [False, False, True, False]
    assert made[1] == made[3] and len({file for file, _ in made}) == 3


ALL = (-FAR, FAR)
TILES = {
    "zigzag": (512, 512, ((-FAR, 0, 0, 256, 0, 256), (*ALL, 256, 512, 0, 256), (-FAR, 0, 256, 512, 256, 512))),
    "blocks of 32": (
        160,
        320,
        tuple((*ALL, a, a + 32, c, c + 32) for a in range(0, 160, 32) for c in range(0, 320, 32) if (a + 3 * c) % 5),
    ),
    "odd ends": (333, 301, ((*ALL, 0, 96, 288, 301), (*ALL, 96, 333, 0, 64), (*ALL, 320, 333, 256, 301), (-FAR, -32, 128, 160, 96, 128))),
    "a row that sees nothing": (128, 128, ((-FAR, 0, 32, 64, 32, 64), (*ALL, 96, 128, 0, 128))),
    "window": (333, 333, ((-99, 0, 0, 333, 0, 333),)),
    "least": (200, 200, ((-62, 0, 0, 200, 0, 200),)),
    "ahead and behind": (210, 150, ((-40, 30, 0, 96, 0, 150), (-97, -3, 96, 210, 32, 128))),
    "one border": (100, 170, ((41, FAR, 0, 100, 0, 170),)),
}


def test_what_blocks_see_takes_no_memory_but_their_own() -> None:
    """A rank of 262,144 tokens: 67 million blocks, a byte each, and a few of them more while they are marked."""
    n = 262_144 // 32
    code = f"""
import resource
from ringctx.kernels.native import _marked
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = _marked(((-4095, 0, 0, {32 * n}, 0, {32 * n}),), {n}, {n})
print(found.numel(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    numbers, taken = map(int, done.stdout.split())
    assert numbers == n * n + n * n // 16 and taken < 4.5 * numbers


@HERE
@pytest.mark.parametrize("heads", [(2, 2, 64, 64), (4, 2, 32, 96)], ids=["plain", "shared"])
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_a_rectangle_in_one_call(unit: Unit, name: str, heads: tuple[int, ...]) -> None:
    s, n, tiles = TILES[name]
    q, k, v, dout, dlse = drawn(unit.dtype, 2, s, n, *heads)
    seen = torch.zeros(s, n, dtype=torch.bool)
    ahead = torch.arange(n) - torch.arange(s)[:, None]
    for low, high, a, b, c, d in tiles:
        seen[a:b, c:d] = ((ahead >= low) & (ahead <= high))[a:b, c:d]
    scores = TileScores(q.shape[3] ** -0.5)
    masked = replace(scores, mask=lambda: seen)
    out, lse = Native().forward(q, k, v, scores, tiles)
    want, want_lse = Reference().forward(*(x.double() for x in (q, k, v)), masked)
    blind = ~seen.any(-1)
    assert torch.equal(lse.isneginf(), want_lse.isneginf()) and not out[:, blind].any()
    assert off(out, want) < unit.out and off(lse[:, ~blind], want_lse[:, ~blind]) < 1e-5
    whole, rows = out.to(unit.dtype), lse.masked_fill(lse.isneginf(), 0.0)
    got = Native().backward(dout, q, k, v, whole, rows, scores, dlse, tiles)
    exact = Reference().backward(*(x.double() for x in (dout, q, k, v, whole)), rows.double(), masked, dlse.double())
    for x, y in zip(got, exact, strict=True):
        assert x.shape == y.shape and off(x, y) < unit.grads
