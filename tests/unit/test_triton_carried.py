"""Selective Attention's Triton kernels against a float64 oracle, in Triton's interpreter; and compiled for GPUs that are not there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ringctx import Attention, Layout, ring_attention
from ringctx.errors import Unsupported
from ringctx.kernels import triton_carried
from ringctx.kernels.triton_carried import backward, forward, why_not
from ringctx.methods.selective import Selective
from ringctx.patterns import causal, window
from ringctx.testing import dense, error, errors, golden_inputs
from tests.unit.machine import Machine
from tests.virtual import run

triton = pytest.importorskip("triton", reason="Triton is not installed; run `make triton`")

interpreted = pytest.mark.skipif(why_not("cpu", torch.float32) is not None, reason="Triton's interpreter is off; run `make triton`")
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3}


@dataclasses.dataclass
class Problem:
    """A whole sequence: rows i against keys j."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    i: Tensor
    j: Tensor
    spared: Tensor
    scale: float
    mask: Tensor | None = None


def problem(rows=33, keys=33, h=2, g=2, d=16, e=None, b=2, after=0, dtype=torch.float32, seed=0):
    """Random tensors; the rows' indices begin `after` places after the keys'. Key 0 is spared."""
    make = torch.Generator().manual_seed(seed)
    e = d if e is None else e
    shapes = (b, rows, h, d), (b, keys, g, d), (b, keys, g, e), (b, rows, h, e), (b, rows, h)
    q, k, v, dout, dlse = (torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes)
    spared = torch.zeros(1, keys, dtype=torch.bool)
    spared[:, :1] = True
    return Problem(q, k, v, dout, dlse.float(), torch.arange(rows) + after, torch.arange(keys), spared, 0.5 * d**-0.5)


def oracle(p):
    """out, lse, what the rows gave each key, dq, dk, dv of whole logits in float64, as the definition says it."""
    q, k, v = (x.double().requires_grad_() for x in (p.q, p.k, p.v))
    times = q.shape[2] // k.shape[2]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(times, 2)) * p.scale
    seen = (p.j[None, :] <= p.i[:, None]).expand(logits.shape)
    if p.mask is not None:
        seen = seen & p.mask
    gives = seen[:, 0] & (p.j[None, :] < p.i[:, None]) & ~p.spared[:, None, :]
    given = logits[:, 0].relu().where(gives, 0.0)
    before = given.cumsum(1).roll(1, 1)
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, 1:]], 1)
    alive = seen.any(-1, keepdim=True)
    logits = (logits - before[:, None]).masked_fill(~seen, -math.inf).where(alive, 0.0)
    out = torch.einsum("bhqk,bkhe->bqhe", logits.softmax(-1) * alive, v.repeat_interleave(times, 2))
    lse = logits.logsumexp(-1).where(alive[..., 0], 0.0).transpose(1, 2)
    grads = torch.autograd.grad((out * p.dout.double()).sum() + (lse * p.dlse.double()).sum(), (q, k, v))
    return out.detach(), lse.detach().masked_fill(~alive[..., 0].transpose(1, 2), -math.inf), given.sum(1).detach(), *grads


def tiles_of(p, row_cuts, key_cuts):
    """Runs of keys, each with its runs of rows in ascending order."""
    spans = [[slice(*x) for x in itertools.pairwise((0, *cuts, size))] for cuts, size in ((row_cuts, len(p.i)), (key_cuts, len(p.j)))]
    return [(keys, spans[0]) for keys in spans[1]]


def arguments(p, rows, keys):
    """What forward and backward take of one tile: its tensors, and spared, scale and mask."""
    mask = None if p.mask is None else p.mask[:, :, rows, keys]
    return (p.q[:, rows], p.k[:, keys], p.v[:, keys]), (p.i[rows], p.j[keys]), (p.spared[:, keys], p.scale, mask)


def answer(p, row_cuts=(), key_cuts=()):
    """What the oracle gives, by tiles: sums go upwards through the runs of rows and their gradients downwards."""
    parts, sums = [], {}
    total = torch.zeros(len(p.q), len(p.j))
    for keys, runs in tiles_of(p, row_cuts, key_cuts):
        outs = []
        for rows in runs:
            qkv, ij, rest = arguments(p, rows, keys)
            sums[keys.start, rows.start] = total[:, keys].clone()
            out, lse, added = forward(*qkv, *ij, total[:, keys], *rest)
            assert out.dtype == p.q.dtype and lse.dtype == added.dtype == torch.float32
            total[:, keys] += added
            outs.append((out.double(), lse.double()))
        parts.append([torch.cat(x, 1) for x in zip(*outs, strict=True)])
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    whole = lse.masked_fill(lse == -math.inf, 0.0)
    out = sum(out * (part - whole).exp()[..., None] for out, part in parts)
    dq, dk, dv = (torch.zeros(x.shape) for x in (p.q, p.k, p.v))
    for keys, runs in tiles_of(p, row_cuts, key_cuts):
        later = torch.zeros(len(p.q), keys.stop - keys.start)
        for rows in reversed(runs):
            qkv, ij, rest = arguments(p, rows, keys)
            row = out[:, rows].to(p.q.dtype), whole[:, rows].float(), p.dlse[:, rows]
            *grads, given = backward(p.dout[:, rows], *qkv, *row, *ij, sums[keys.start, rows.start], *rest, later)
            assert {x.dtype for x in (*grads, given)} == {torch.float32}
            later = later + given
            for whole_grad, grad, span in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
                whole_grad[:, span] += grad
    return out, lse, total, dq, dk, dv


def check(p, row_cuts=(), key_cuts=(), limit=None):
    for name, got, want in zip(("out", "lse", "added", "dq", "dk", "dv"), answer(p, row_cuts, key_cuts), oracle(p), strict=True):
        assert error(got, want, floor=1e-3) <= (limit or LIMITS[p.q.dtype]), name


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16, so that small tiles have several; the widths of these tests' tensors have 32 otherwise."""
    monkeypatch.setattr(triton_carried, "_block", lambda width, itemsize: 16)


def holes(b, h, rows, keys):
    """A mask (b, h, rows, keys) in which every fifth row and the last key see nothing."""
    seen = torch.rand(b, h, rows, keys, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[:, :, ::5] = False
    seen[..., -1] = False
    return seen


@interpreted
@pytest.mark.parametrize("size", [1, 17, 33, 64])
def test_a_causal_tile(size, small_blocks):
    check(problem(size, size))


@interpreted
@pytest.mark.parametrize("rows, keys", [(1, 33), (17, 1), (33, 17), (20, 64)])
def test_a_whole_tile(rows, keys, small_blocks):
    check(problem(rows, keys, after=keys))


@interpreted
@pytest.mark.parametrize("h, g", [(1, 1), (2, 2), (4, 2), (3, 1)])
def test_query_heads_share_key_heads(h, g, small_blocks):
    check(problem(20, 33, h, g, after=13))


@interpreted
@pytest.mark.parametrize("d, e", [(16, 32), (20, 7), (33, 16), (3, 5)])
def test_keys_and_values_of_any_width(d, e):
    check(problem(17, 17, d=d, e=e))


@interpreted
@pytest.mark.parametrize("b, h", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_masks_by_batch_row_and_head_with_rows_that_see_nothing(b, h, small_blocks):
    check(dataclasses.replace(problem(33, 20, b=3), mask=holes(b, h, 33, 20)))


@interpreted
@pytest.mark.parametrize("row_cuts, key_cuts", [((17,), ()), ((), (20,)), ((16, 32), (16, 32)), ((5, 6, 40), (1, 33))], ids=str)
def test_tiles_in_sequence_give_the_whole_sequence(row_cuts, key_cuts, small_blocks):
    check(problem(50, 50, h=2, g=1), row_cuts, key_cuts)


@interpreted
def test_tiles_in_sequence_with_a_mask(small_blocks):
    check(dataclasses.replace(problem(40, 40), mask=holes(2, 2, 40, 40)), (13, 30), (19,))


@interpreted
def test_indices_with_gaps(small_blocks):
    """Rows 1 4 7 ... see keys 0 2 4 ...: neither starts with the other, and blocks begin at odd places."""
    p = problem(33, 50)
    check(dataclasses.replace(p, i=3 * p.i + 1, j=2 * p.j), (20,), (24,))


@interpreted
def test_spared_keys_differ_by_batch_row(small_blocks):
    p = problem(33, 33, b=3)
    spared = torch.rand(3, 33, generator=torch.Generator().manual_seed(2)) < 0.3
    check(dataclasses.replace(p, spared=spared), (17,), (17,))


@interpreted
def test_the_kernels_own_blocks():
    check(problem(70, 70), (), (40,))


@interpreted
def test_half_precision():
    check(problem(33, 33, h=4, dtype=torch.float16), (20,))


@interpreted
def test_large_logits_leave_no_infinity():
    """Penalties in the thousands: what they hide is hidden, and what is left is exact."""
    p = problem(40, 40)
    check(dataclasses.replace(p, scale=10.0), (20,), (20,), limit=5e-5)


@interpreted
def test_golden_values():
    """lse of six tokens, and the penalties of the sixth, as the method's definition was once worked out without this oracle."""
    q, k, v, _ = (x.float() for x in golden_inputs(n=6, d=4))
    place = torch.arange(6)
    none, spared = torch.zeros(1, 6), place[None] == 0
    _, lse, _ = forward(q, k, v, place, place, none, spared, 0.5, None)
    assert lse[0, :, 0].tolist() == pytest.approx([1.732740, 2.367101, 2.818615, 2.613359, 2.269656, 2.711771], abs=2e-6)
    assert lse[0, :, 1].tolist() == pytest.approx([1.806391, 2.357712, 2.537769, 2.231982, 2.269554, 2.847728], abs=2e-6)
    _, _, added = forward(q[:, :5], k, v, place[:5], place, none, spared, 0.5, None)
    assert added[0].tolist() == pytest.approx([0.0, 2.428930, 2.043371, 1.270661, 0.0, 0.0], abs=2e-6)


@interpreted
def test_no_gradient_of_lse_is_a_gradient_of_zero():
    p = problem(17, 17)
    qkv, ij, rest = arguments(p, slice(0, 17), slice(0, 17))
    out, lse, _ = forward(*qkv, *ij, torch.zeros(2, 17), *rest)
    absent, zero = (
        backward(p.dout, *qkv, out, lse, dlse, *ij, torch.zeros(2, 17), *rest, torch.zeros(2, 17)) for dlse in (None, torch.zeros_like(lse))
    )
    assert all(torch.equal(x, y) for x, y in zip(absent, zero, strict=True))


@interpreted
@pytest.mark.parametrize("rows, keys", [(0, 5), (5, 0)])
def test_an_empty_tile(rows, keys):
    p = problem(rows, keys)
    qkv, ij, rest = arguments(p, slice(0, rows), slice(0, keys))
    out, lse, added = forward(*qkv, *ij, torch.zeros(2, keys), *rest)
    assert out.shape == p.dout.shape and not out.any() and bool(lse.isneginf().all()) and not added.any()
    grads = backward(p.dout, *qkv, out, torch.zeros_like(lse), None, *ij, torch.zeros(2, keys), *rest, torch.zeros(2, keys))
    assert [x.shape for x in grads] == [*(x.shape for x in qkv), (2, keys)] and not any(x.any() for x in grads)


@interpreted
@pytest.mark.parametrize("dtype, reason", [(torch.bfloat16, "interpreter computes bfloat16 wrongly"), (torch.float64, "float16 only")])
def test_what_is_not_computed_rightly_is_refused(dtype, reason):
    p = problem(5, 5, dtype=dtype)
    qkv, ij, rest = arguments(p, slice(0, 5), slice(0, 5))
    with pytest.raises(Unsupported, match=reason):
        forward(*qkv, *ij, torch.zeros(2, 5), *rest)


@pytest.mark.skipif(why_not("cpu", torch.float32) is None, reason="Triton's interpreter is on, which compiles nothing")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("capability, shared", [(80, 166_912), (90, 232_448)])
@pytest.mark.parametrize("dtype, d, e", [(torch.bfloat16, 128, 128), (torch.float16, 48, 64), (torch.float32, 64, 20)])
def test_every_launch_compiles_for_a_gpu_and_fits_its_shared_memory(monkeypatch, capability, shared, dtype, d, e):
    """Triton itself refuses a kernel that wants more shared memory than the machine has."""
    machine = Machine(capability, shared)
    monkeypatch.setattr(triton.runtime.driver, "_active", machine)
    with FakeTensorMode():
        empty = functools.partial(torch.empty, device="cuda")
        q, k, v = (empty(2, *shape, dtype=dtype) for shape in ((300, 4, d), (200, 2, d), (200, 2, e)))
        i, j = empty(300, dtype=torch.int64), empty(200, dtype=torch.int64)
        sums, spared = empty(2, 200), empty(2, 200, dtype=torch.bool)
        mask = empty(1, 4, 300, 200, dtype=torch.bool) if dtype == torch.float32 else None
        out, lse, added = forward(q, k, v, i, j, sums, spared, 0.1, mask)
        assert (out.shape, out.dtype) == ((2, 300, 4, e), dtype)
        assert lse.shape == (2, 300, 4) and added.shape == sums.shape
        *grads, given = backward(out, q, k, v, out, lse, lse, i, j, sums, spared, 0.1, mask, sums)
        assert [x.shape for x in (*grads, given)] == [q.shape, k.shape, v.shape, sums.shape]
        assert {x.dtype for x in (lse, added, *grads, given)} == {torch.float32}
    assert set(machine.kernels) == {"_scan", "_attend", "_scan_back", "_first_back", "_queries_back", "_keys_back"}


def of_a_ring(ring, layout, attention, whole):
    """out, lse, dq, dk, dv of one rank's share."""
    q, k, v = (layout.shard(x, ring.rank).clone().requires_grad_() for x in whole[:3])
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, return_lse=True)
    slopes = [layout.shard(x, ring.rank) for x in whole[3:]]
    return out.detach(), lse.detach(), *torch.autograd.grad([out, lse], (q, k, v), slopes)


@interpreted
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("pattern", [causal(), causal() & window(9)], ids=str)
def test_a_ring_computes_its_tiles_with_it(kind, pattern, monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        kernel = getattr(triton_carried, name)
        monkeypatch.setattr(triton_carried, name, lambda *x, kernel=kernel, name=name: calls.append(name) or kernel(*x))
    attention = Attention(pattern=pattern, carry=Selective())
    make = torch.Generator().manual_seed(3)
    whole = [torch.randn(1, 41, *shape, generator=make) for shape in ((4, 16), (2, 16), (2, 16), (4, 16), (4,))]
    layout = getattr(Layout, kind)(41, 2)
    parts = run(of_a_ring, layout, attention, whole, size=2)
    got = [layout.unshard(list(part)) for part in zip(*parts, strict=True)]
    q, k, v, dout, dlse = whole
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), got, strict=True))
    assert max(errors(dense(attention, q, k, v, dout=dout, dlse=dlse), dout=dout, **found).values()) < 5e-6
    assert set(calls) == {"forward", "backward"}
