"""How far an attention over ranks is from fp64, and one call of torch's own beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ringctx.config import ModelConfig
from ringctx.core.attention import Attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Message, Ring
from ringctx.device import device_of
from ringctx.tools.bench.case import Case, sdpa, tensors_of


def accuracy(ring: Ring, case: Case) -> dict[str, dict[str, float]] | None:
    """Relative error against fp64 of out, dq, dk, dv: of the ring, and of one call of torch's own attention in the same dtype.

    {"ring": {...}, "one call": {...}} on rank 0, None elsewhere. All ranks must call this together.
    """
    layout, device = Layout.zigzag(case.S, ring.size), device_of(ModelConfig())
    tensors = [x.to(device) for x in tensors_of(case)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(), transport=case.transport, kernel=case.kernel)
        assert isinstance(out, Tensor)
        return out

    found = whole_of(ring, layout, attend, tensors)
    if found is None:
        return None
    torch.set_num_threads(2)
    exact = whole(sdpa, [x.double() for x in tensors])
    once = whole(sdpa, tensors)
    torch.set_num_threads(1)
    return {"ring": far(found, exact), "one call": far(once, exact)}


def whole_of(ring: Ring, layout: Layout, attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor] | None:
    """out, dq, dk, dv of all ranks' shares, whole, on rank 0. tensors: q, k, v, dout, whole."""
    shards = [_collect(ring, layout, x) for x in whole(attend, [layout.shard(x, ring.rank) for x in tensors])]
    return None if ring.rank else [layout.unshard(x) for x in shards]


def far(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative errors."""
    names = ("out", "dq", "dk", "dv")
    return {n: float((x.double() - y).norm() / y.norm()) for n, x, y in zip(names, found, exact, strict=True)}


def _collect(ring: Ring, layout: Layout, mine: Tensor) -> list[Tensor]:
    """Every rank's shard, on rank 0."""
    others = list(range(1, ring.size))
    if ring.rank:
        ring.exchange("results", "a result", (), [Message(0, (mine.contiguous(),))]).wait()
        return []
    shards = {r: mine.new_empty(mine.shape[0], layout.count(r), *mine.shape[2:]) for r in others}
    ring.exchange("results", "results", [Message(r, (x,)) for r, x in shards.items()]).wait()
    return [mine, *shards.values()]


def whole(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv. tensors: q, k, v, dout."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = attend(*leaves)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
