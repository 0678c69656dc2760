"""Tri Dao's flash-attn, generations 2, 3 and 4: whatever is installed and fits the GPU, for whole and causal tiles.

Never run on a GPU here: calls follow the signatures of flash-attn 2.8.3 (2 and its hopper folder, 3) and flash-attn-4
4.0.0b36, and tests hold them against those signatures with stubs.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ringctx.kernels.base import Call, TileScores
from ringctx.kernels.tricks import is_empty, no_gradient, nothing_seen, padded_backward, require_square, rows_of_lse, unit_stride, widen

Grads = tuple[Tensor, Tensor, Tensor]


class Generation(Protocol):
    """One generation of flash-attn: where it lives, which GPUs and widths it knows, and its two calls.

    Widths are multiples of 8, equal for keys and values; lse and dlse are (b h q).
    """

    module: str
    majors: range
    widest: int
    takes_dlse: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, dlse: Tensor | None
    ) -> Grads: ...


class Flash2:
    """flash-attn 2, compute capability 8 and newer."""

    module = "flash_attn.flash_attn_interface"
    majors = range(8, 13)
    widest = 256
    takes_dlse = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        flash = _load(self.module)._flash_attn_forward
        out, lse, *_ = flash(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, dlse: Tensor | None
    ) -> Grads:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        flash = _load(self.module)._flash_attn_backward
        flash(dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, causal, -1, -1, 0.0, None, False)
        return dq, dk, dv


class Flash3:
    """flash-attn 3, Hopper only."""

    module = "flash_attn_interface"
    majors = range(9, 10)
    widest = 256
    takes_dlse = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        absent = (None,) * 20  # k_new ... v_descale: caches, page tables, rotary and fp8
        out, lse, *_ = _load(self.module)._flash_attn_forward(q, k, v, *absent, scale, causal)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, dlse: Tensor | None
    ) -> Grads:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        absent = (None,) * 6  # cu_seqlens_q ... max_seqlen_k
        _load(self.module)._flash_attn_backward(dout, q, k, v, out, lse, *absent, dq, dk, dv, scale, causal)
        return dq, dk, dv


class Flash4:
    """flash-attn 4, Hopper and Blackwell; knows the gradient of lse."""

    module = "flash_attn.cute.interface"
    majors = range(9, 12)
    widest = 128
    takes_dlse = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _load(self.module)._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool, dlse: Tensor | None
    ) -> Grads:
        dq, dk, dv, *_ = _load(self.module)._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, dlse=dlse)
        return dq, dk, dv


GENERATIONS: tuple[Generation, ...] = (Flash3(), Flash4(), Flash2())


class Flash:
    """The first of GENERATIONS that is installed and fits; see Kernel for the shapes."""

    name = "flash"

    def why_not(self, call: Call) -> str | None:
        if call.device.split(":")[0] != "cuda":
            return "needs CUDA"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return "computes bfloat16 and float16 only"
        for feature in ("elementwise", "bias", "bias_grad", "mask"):
            if getattr(call, feature):
                return f"has no {feature.replace('_', ' ')} here, only whole and causal tiles"
        if call.dropout:
            return "draws its own dropout and cannot take a given one"
        reasons = [reason for _, reason in self._candidates(max(call.d, call.e))]
        if None in reasons:
            return None
        if all(reason == "not installed" for reason in reasons):
            return "not installed (pip install ringctx[flash])"
        return "; ".join(f"{type(g).__name__}: {reason}" for g, reason in zip(GENERATIONS, reasons, strict=True))

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
        generation, e = self._generation(q, v), v.shape[-1]
        q, k, v = (unit_stride(widen(x, width)) for x in (q, k, v))
        out, lse = generation.forward(q, k, v, scores.scale, scores.causal)
        return out.narrow(-1, 0, e), lse.transpose(1, 2)

    @torch.no_grad()
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> Grads:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        generation = self._generation(q, v)
        lse = rows_of_lse(lse.transpose(1, 2).contiguous())
        own_dlse = dlse.transpose(1, 2).contiguous() if dlse is not None and generation.takes_dlse else None

        def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Grads:
            dout, q, k, v, out = (unit_stride(x) for x in (dout, q, k, v, out))
            return generation.backward(dout, q, k, v, out, lse, scores.scale, scores.causal, own_dlse)

        dlse = None if generation.takes_dlse else dlse
        return padded_backward(run, dout.to(q.dtype), q, k, v, out.to(q.dtype), dlse, multiple=8, widest=generation.widest)

    def _generation(self, q: Tensor, v: Tensor) -> Generation:
        return next(g for g, reason in self._candidates(max(q.shape[-1], v.shape[-1])) if reason is None)

    def _candidates(self, width: int) -> list[tuple[Generation, str | None]]:
        """Each generation with the reason it cannot serve tensors of this width, or None."""
        return [(generation, _why_not(generation, width)) for generation in GENERATIONS]


def _why_not(generation: Generation, width: int) -> str | None:
    if not _is_installed(generation.module):
        return "not installed"
    if _major() not in generation.majors:
        return f"has no kernels for compute capability {_major()}"
    if width > generation.widest:
        return f"at most {generation.widest} wide"
    return None


def _major() -> int:
    """The GPU's compute capability, first number."""
    return torch.cuda.get_device_capability()[0]


def _is_installed(module: str) -> bool:
    try:
        _load(module)
    except ImportError:
        return False
    return True


def _load(module: str) -> ModuleType:
    return importlib.import_module(module)
