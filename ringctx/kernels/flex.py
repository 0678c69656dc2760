"""torch's flex_attention: masked tiles on CUDA, where the fused kernels take no mask.

Never run on a GPU here. Verified on CPU: the forward with its masks, uncompiled; the backward's algebra, with dense
attention in flex_attention's place. flex_attention gives no backward for a row whose out and lse come from elsewhere, so
backward recomputes the tile and turns the whole row's gradient into one of the tile's own out and lse.
Letters: b batch, q and k the tile's queries and keys, h query heads, g key/value heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ringctx.kernels.base import Call, TileScores
from ringctx.kernels.tricks import is_empty, no_gradient, nothing_seen, require_square, rows_of_lse


class Flex:
    """flex_attention with the tile's bool mask read by mask_mod; see Kernel for the shapes."""

    name = "flex"

    def why_not(self, call: Call) -> str | None:
        kind = call.device.split(":")[0]
        if kind == "cpu":
            return "on CPUs flex_attention has neither lse nor backward"
        if kind != "cuda":
            return f"flex_attention was not tried on {kind}"
        for feature in ("elementwise", "bias", "bias_grad", "dropout"):
            if getattr(call, feature):
                return f"has no {feature.replace('_', ' ')} here, only masks"
        if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return "computes float32, bfloat16 and float16 only"
        if min(call.d, call.e) < 16:
            return "is at least 16 wide"
        return None

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return nothing_seen(q, v)
        out, lse = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scores)
        return out.transpose(1, 2), lse.float().transpose(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: TileScores, dlse: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With w = exp(tile's lse - row's lse) the row's P is w times the tile's, so its gradients are those of the tile
        with dout w and dlse w (dout.tile's out - dout.out + dlse).
        """
        require_square(q, k, scores)
        if is_empty(q, k, v):
            return no_gradient(q, k, v)
        with torch.enable_grad():
            leaves = tuple(x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
            tile_out, tile_lse = _attend(leaves[0], leaves[1], leaves[2], scores)
        with torch.no_grad():
            dout, out, lse = (x.float().transpose(1, 2) for x in (dout, out, rows_of_lse(lse)))
            share = (tile_lse.float() - lse).exp()  # 0 where the tile shows a row nothing
            tile_dlse = (dout * (tile_out.float() - out)).sum(-1)
            if dlse is not None:
                tile_dlse = tile_dlse + dlse.float().transpose(1, 2)
            tile_dout = (dout * share.unsqueeze(-1)).to(tile_out.dtype)
        grads = torch.autograd.grad((tile_out, tile_lse), leaves, (tile_dout, (tile_dlse * share).to(tile_lse.dtype)))
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
    """q (b h q d), k (b g k d), v (b g k e) -> out (b h q e), lse (b h q), natural logarithm."""
    from torch.nn.attention.flex_attention import AuxRequest

    is_grouped = q.shape[1] != k.shape[1]
    request = AuxRequest(lse=True)
    out, aux = _flex()(q, k, v, block_mask=_block_mask(q, k, scores), scale=scores.scale, enable_gqa=is_grouped, return_aux=request)
    return out, aux.lse


def _block_mask(q: Tensor, k: Tensor, scores: TileScores) -> Any:
    """The tile's mask as flex_attention wants it, or None if all is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    if scores.mask is None and not scores.causal:
        return None
    num_queries, num_keys = q.shape[2], k.shape[2]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    if scores.causal:
        seen = seen.tril()
    if scores.mask is not None:
        seen = seen & scores.mask()
    seen = seen[(None,) * (4 - seen.ndim)]
    num_batches, num_heads = seen.shape[:2]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b if num_batches > 1 else 0, h if num_heads > 1 else 0, i, j]

    batches = num_batches if num_batches > 1 else None
    heads = num_heads if num_heads > 1 else None
    return create_block_mask(mask_mod, batches, heads, num_queries, num_keys, device=q.device)


@cache
def _flex() -> Callable[..., Any]:
    """flex_attention, compiled: uncompiled it holds all logits."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
