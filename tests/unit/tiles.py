"""Tiles for the kernels' tests: problems, masks, attention's definition in fp64, and the comparison."""

from __future__ import annotations

import dataclasses
import math

import torch

from ringctx.kernels import TileScores
from ringctx.kernels.reference import Reference
from ringctx.kernels.sdpa import Sdpa

SDPA, REFERENCE = Sdpa(), Reference()
KERNELS = {"sdpa": SDPA, "reference": REFERENCE, "precise": Sdpa("precise", precise=True)}


class Cap:
    """An elementwise score for these tests: 2 tanh(x / 2)."""

    def apply(self, logits):
        return 2 * torch.tanh(logits / 2)

    def derivative(self, logits):
        return 1 - torch.tanh(logits / 2).square()


@dataclasses.dataclass
class Problem:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor

    def to(self, dtype):
        return Problem(*(getattr(self, f.name).to(dtype) for f in dataclasses.fields(self)))


def problem(b=2, q=37, k=53, h=4, g=2, d=32, e=None, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    e = d if e is None else e
    shapes = (b, q, h, d), (b, k, g, d), (b, k, g, e), (b, q, h, e), (b, q, h)
    rounded = (torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes)
    return Problem(*rounded)


def dense(p, scores, dlse=True, more=None):
    """out, lse, dq, dk, dv of the definition in fp64, then the gradient of the bias; `more` = (out, lse) of other keys to merge with."""
    q, k, v = (x.double().requires_grad_() for x in (p.q, p.k, p.v))
    times = q.shape[2] // k.shape[2]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(times, 2)) * scores.scale
    for step in scores.elementwise:
        logits = step.apply(logits)
    bias = torch.zeros(()) if scores.bias is None else scores.bias()
    bias = bias.double().expand(logits.shape).clone().requires_grad_()
    logits = logits + bias
    seen = torch.ones(logits.shape, dtype=torch.bool)
    if scores.causal:
        seen = seen.tril()
    if scores.mask is not None:
        seen = seen & scores.mask()
    alive = seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen, -math.inf).masked_fill(~alive, 0.0)
    weights = logits.softmax(-1) * alive
    if scores.keep is not None:
        weights = weights * scores.keep().double()
    out = torch.einsum("bhqk,bkhe->bqhe", weights, v.repeat_interleave(times, 2))
    lse = logits.logsumexp(-1).masked_fill(~alive.squeeze(-1), 0.0).transpose(1, 2)
    loss = (out * p.dout.double()).sum() + ((lse * p.dlse.double()).sum() if dlse else 0.0)
    grads = torch.autograd.grad(loss, (q, k, v, bias), allow_unused=True)
    dead = ~alive.squeeze(-1).transpose(1, 2)
    return out.detach(), lse.detach().masked_fill(dead, -math.inf), *grads


def answer(kernel, p, scores, dlse=True):
    out, lse = kernel.forward(p.q, p.k, p.v, scores)
    whole = lse.masked_fill(lse == -math.inf, 0.0)
    grads = kernel.backward(p.dout, p.q, p.k, p.v, out.to(p.q.dtype), whole, scores, p.dlse if dlse else None)
    return out, lse, *grads


def error(got, want):
    """Relative Frobenius error; infinities must stand in the same places."""
    infinite = torch.isinf(want)
    assert torch.equal(torch.isinf(got), infinite)
    assert not torch.isnan(got).any()
    got, want = got.double().masked_fill(infinite, 0.0), want.masked_fill(infinite, 0.0)
    return float((got - want).norm() / max(float(want.norm()), 1e-9))


LIMITS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(kernel, p, scores, dlse=True, limit=None):
    got, want = answer(kernel, p, scores, dlse), dense(p, scores, dlse)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        assert x.shape == y.shape, name
        assert error(x, y) <= (limit or LIMITS[p.q.dtype]), name
    wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    assert got[1].dtype == wide
    assert all(x.dtype in (p.q.dtype, wide) for x in got)


def holes(q, k, heads=1, batch=1, seed=1):
    """A random mask (batch, heads, q, k) in which every fifth row and the last column see nothing."""
    seen = torch.rand(batch, heads, q, k, generator=torch.Generator().manual_seed(seed)) < 0.4
    seen[:, :, ::5] = False
    seen[..., -1] = False
    return seen


def tile(kind, q, k, h=4, scale=0.3):
    if kind == "full":
        return TileScores(scale)
    if kind == "causal":
        return TileScores(scale, causal=True)
    seen = {"partial": holes(q, k)[0, 0], "heads": holes(q, k, h), "batches": holes(q, k, h, 2), "both": holes(q, k)}[kind]
    return TileScores(scale, causal=kind == "both", mask=lambda: seen)
