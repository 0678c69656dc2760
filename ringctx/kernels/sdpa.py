"""Torch's own flash kernels, called below autograd because only there they hand out lse.

On CPUs any mask or bias becomes an additive mask of the tile; on CUDA only whole and causal tiles are taken. Every known
trap of the CPU kernel has its guard here or in `tricks`: rows that see nothing come back with lse 0, empty tensors kill the
process, a strided last dim is misread, a bool mask is refused, keys and values must be equally wide.
Never run on a GPU: the CUDA path is traced with fake tensors only.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ringctx.kernels.base import Call, TileScores
from ringctx.kernels.tricks import is_empty, no_gradient, nothing_seen, padded_backward, require_square, rows_of_lse, unit_stride, widen

FEW_ROWS = 768  # from so many query rows on, aten's backward takes 256 at a time; below, 64: each time it rounds dk and dv
CUDA_WIDEST = 256
HALF = (torch.bfloat16, torch.float16)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a CPU computes this dtype in: fp32 for half precision it has no instructions for.

    Without them aten's bf16 backward is 7 times slower than its fp32 backward (8,192 tokens, 8 heads, width 64, AVX2).
    """
    if dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype if native else torch.float32
    if dtype == torch.float16:
        return dtype if torch.cpu._is_amx_fp16_supported() else torch.float32
    return dtype


class Sdpa:
    """aten's flash attention; see Kernel for the shapes.

    In half precision aten adds up dk, dv in that dtype. Backward of few rows therefore runs in pieces, one query head per
    key head and about 256 rows each, whose dk, dv are summed in fp32; that costs nothing. precise: many rows do too, 1,024
    each, at 1 to 4 % of the time (dk, dv of bf16 at 8,192 tokens: 8.9e-3 from fp64 in one call, 3.8e-3 in pieces).
    """

    def __init__(self, name: str = "sdpa", precise: bool = False) -> None:
        self.name = name
        self.precise = precise

    def why_not(self, call: Call) -> str | None:
        if call.elementwise:
            return "aten's flash kernel has no elementwise scores"
        if call.dropout:
            return "aten's flash kernel draws its own dropout and cannot take a given one"
        if call.bias_grad:
            return "aten's flash kernel has no gradient of a bias"
        kind = call.device.split(":")[0]
        if kind == "cuda":
            return _why_not_on_cuda(call)
        if kind != "cpu":
            return f"aten has no flash kernel for {kind}"
        if call.dtype not in (torch.float64, torch.float32, *HALF):
            return "aten's flash kernel computes float64, float32, bfloat16 and float16 only"
        return None

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        if q.is_cuda:
            return _forward_on_cuda(q, k, v, scores)
        additive = additive_mask(q, k, scores)
        dtype = _compute_dtype(q.dtype)
        width = max(q.shape[-1], v.shape[-1])
        views = (_heads_first(widen(x.to(dtype), width)) for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(*views, 0.0, scores.causal, attn_mask=additive, scale=scores.scale)
        if additive is not None:
            unseen = additive.amax(-1) == -math.inf  # the kernel says 0
            lse = lse.masked_fill(unseen, -math.inf)
        return out.transpose(1, 2)[..., : v.shape[-1]], lse.transpose(1, 2)

    @torch.no_grad()
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        if q.is_cuda:
            return _backward_on_cuda(dout, q, k, v, out, lse, scores, dlse)
        lse = rows_of_lse(lse)
        additive = additive_mask(q, k, scores)
        dtype = _compute_dtype(q.dtype)
        dout, q, k, v, out = (x.to(dtype) for x in (dout, q, k, v, out))

        def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            few = q.shape[1] < FEW_ROWS
            if dtype not in HALF or not (few or self.precise):
                return _backward_call(dout, q, k, v, out, lse, scores.causal, additive, scores.scale)
            rows = 256 if few else 1024
            return _backward_in_pieces(rows, dout, q, k, v, out, lse, scores.causal, additive, scores.scale)

        return padded_backward(run, dout, q, k, v, out, dlse)


def _heads_first(x: Tensor) -> Tensor:
    """(b s h d) -> (b h s d), a view that the kernel reads rightly."""
    return unit_stride(x).transpose(1, 2)


def additive_mask(q: Tensor, k: Tensor, scores: TileScores) -> Tensor | None:
    """Mask, bias and, beside them, causality as one tensor to add, -inf where unseen: (1|b 1|h q k), or None."""
    if scores.mask is None and scores.bias is None:
        return None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = None if scores.mask is None else scores.mask()
    if scores.causal:
        square = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        seen = square if seen is None else seen & square
    bias = torch.zeros((), dtype=dtype, device=q.device) if scores.bias is None else scores.bias().to(dtype)
    total = bias if seen is None else torch.where(seen, bias, -math.inf)
    total = total.expand(torch.broadcast_shapes(total.shape, (q.shape[1], k.shape[1])))
    return total[(None,) * (4 - total.ndim)]


def _backward_call(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, additive: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One call of aten's backward, all tensors (b s h d), lse (b q h)."""
    views = (_heads_first(x) for x in (dout, q, k, v, out))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = flash(*views, lse.transpose(1, 2), 0.0, causal, attn_mask=additive, scale=scale)
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _pieces(num_rows: int, num_keys: int, rows: int, causal: bool) -> Iterator[tuple[slice, slice, bool]]:
    """About so many query rows each, keys and whether the piece is causal. Causal: ◣ on the diagonal, █ below."""
    count = max(1, round(num_rows / rows))
    for n in range(count):
        start = n * num_rows // count
        here = slice(start, (n + 1) * num_rows // count)
        if not causal:
            yield here, slice(0, num_keys), False
            continue
        if start:
            yield here, slice(0, start), False
        yield here, here, True


def _backward_in_pieces(
    rows: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, additive: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, a few query rows and one query head per key head at a time, summed in fp32."""
    b, num_rows, h, d = q.shape
    g = k.shape[2]
    dq = q.new_zeros(b, num_rows, g, h // g, d, dtype=torch.float32)
    dk = torch.zeros_like(k, dtype=torch.float32)
    dv = torch.zeros_like(v, dtype=torch.float32)
    shared = [x.unflatten(2, (g, h // g)) for x in (dout, q, out, lse)]
    for here, seen, is_causal in _pieces(num_rows, k.shape[1], rows, causal and additive is None):
        for member in range(h // g):
            dout_, q_, out_, lse_ = (x[:, here, :, member] for x in shared)
            mask = None if additive is None else _of_member(additive, h, g, member)[:, :, here]
            grads = _backward_call(dout_, q_, k[:, seen], v[:, seen], out_, lse_, is_causal, mask, scale)
            dq[:, here, :, member] += grads[0]
            dk[:, seen] += grads[1]
            dv[:, seen] += grads[2]
    return dq.flatten(2, 3), dk, dv


def _of_member(additive: Tensor, h: int, g: int, member: int) -> Tensor:
    """The additive mask (1|b 1|h q k) of every key head's n-th query head."""
    return additive if additive.shape[1] != h else additive.unflatten(1, (g, h // g))[:, :, member]


def _why_not_on_cuda(call: Call) -> str | None:
    if call.mask or call.bias:
        return "aten's CUDA flash kernel takes neither mask nor bias"
    if call.dtype not in HALF:
        return "aten's CUDA flash kernel computes bfloat16 and float16 only"
    if max(call.d, call.e) > CUDA_WIDEST:
        return f"aten's CUDA flash kernel is at most {CUDA_WIDEST} wide"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no CUDA flash kernel"
    if torch.cuda.get_device_capability() < (8, 0):
        return "aten's CUDA flash kernel needs compute capability 8.0"
    return None


def _forward_on_cuda(q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    q, k, wide = (unit_stride(widen(x, width)) for x in (q, k, v))
    flash = torch.ops.aten._flash_attention_forward
    out, lse, *_ = flash(q, k, wide, None, None, q.shape[1], k.shape[1], 0.0, scores.causal, False, scale=scores.scale)
    return out.narrow(-1, 0, v.shape[-1]), lse.transpose(1, 2)


def _backward_on_cuda(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.zeros(2, dtype=torch.int64, device=q.device)  # read only with dropout
    lse = rows_of_lse(lse.transpose(1, 2).contiguous())

    def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flash = torch.ops.aten._flash_attention_backward
        tensors = (unit_stride(x) for x in (dout, q, k, v, out))
        dq, dk, dv = flash(*tensors, lse, None, None, q.shape[1], k.shape[1], 0.0, scores.causal, rng, rng, scale=scores.scale)
        return dq, dk, dv

    return padded_backward(run, dout.to(q.dtype), q, k, v, out.to(q.dtype), dlse, multiple=8, widest=CUDA_WIDEST)
