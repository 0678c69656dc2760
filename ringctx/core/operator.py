"""Ring attention as one torch.library operator: one node to autograd, torch.compile and activation checkpointing.

The operator takes tensors and the number of a Call; whatever is not a tensor stays in the Call. Its fake kernel answers
shapes without a process group, its backward is a second operator, and double backward is refused.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ringctx.core import call as calls
from ringctx.core.attention import Attention
from ringctx.core.call import Call
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import Unsupported
from ringctx.kernels.base import accumulation_dtype

_calls: WeakValueDictionary[int, Call] = WeakValueDictionary()  # rings keep their calls
_next = itertools.count()
MOST_KEPT = 256
"""Calls of a ring that are trained, and as many that are not. One whose backward is to come lives on in autograd."""


def number_of(
    ring: Ring,
    layout: Layout,
    key_layout: Layout,
    attention: Attention,
    transport: str,
    kernel: str,
    train: bool,
    train_params: bool,
    measure: bool = False,
    has_start: bool = False,
) -> int:
    """The number of this way of calling; equal calls share one, whatever numbers their tensors hold."""
    key = (layout, key_layout, attention.key(), transport, kernel, train, train_params, measure, has_start)
    if key not in ring.kept:
        alike = [k for k, (_, call) in ring.kept.items() if call.train is train]
        if len(alike) >= MOST_KEPT:  # a cache that grows has a new layout for every chunk, and every packed batch documents of its own
            for old in alike[: MOST_KEPT // 2]:
                del ring.kept[old]
        number, call = next(_next), Call(ring, layout, key_layout, attention, *key[3:])
        ring.kept[key], _calls[number] = (number, call), call
    return int(ring.kept[key][0])


def forget(ring: Ring, number: int) -> None:
    """Drop a call and all that was planned: the pattern of a selection never comes again, and its plan is long."""
    for key in [key for key, (kept, _) in ring.kept.items() if kept == number]:
        del ring.kept[key]
    calls.forget_plans()


@torch.library.custom_op("ringctx::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, params: list[Tensor], call: int, seed: int, batch_offset: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Forward: out, lse, a carry's memory, and what is kept."""
    return calls.forward(_calls[call], q, k, v, params, seed, batch_offset)


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, params: list[Tensor], call: int, seed: int, batch_offset: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    this = _calls[call]
    route = this.route(q, k, v)
    memory = lse.new_empty(q.shape[:2] if this.measure else 0)
    if this.attention.carry is not None:
        return out, lse, memory, [lse.new_empty(q.shape[0], n) for n in this.kept_sizes(route)]
    if route.trades is None or not this.train:
        return out, lse, memory, []
    b, (queries, keys) = q.shape[0], route.trades
    me = this.ring.rank % route.members
    m, n, h, g = sum(queries.counts), sum(keys.counts), len(route.q_heads[me]), len(route.k_heads[me])
    q_, k_, v_ = q.new_empty(b, m, h, q.shape[3]), k.new_empty(b, n, g, k.shape[3]), v.new_empty(b, n, g, v.shape[3])
    return out, lse, memory, [q_, k_, v_, q.new_empty(b, m, h, v.shape[3]), lse.new_empty(b, m, h)]


@torch.library.custom_op("ringctx::attention_backward", mutates_args=())
def backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    dmemory: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    call: int,
    seed: int,
    batch_offset: int,
    need_param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Backward: dq, dk, dv and the params' gradients."""
    return calls.backward(_calls[call], dout, dlse, dmemory, (q, k, v, out, lse), kept, params, seed, batch_offset, need_param_grads)


@backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    dmemory: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    params: list[Tensor],
    call: int,
    seed: int,
    batch_offset: int,
    need_param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grads = [p.new_empty(p.shape) for p in params] if need_param_grads else []
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, params, ctx.call, ctx.seed, ctx.batch_offset = inputs
    out, lse, _, kept = output
    ctx.held = _calls[ctx.call]  # so that a ring which the caller dropped lives until its backward
    ctx.num_kept = len(kept)
    ctx.save_for_backward(q, k, v, out, lse, *kept, *params)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dmemory: Tensor | None, dkept: object) -> tuple[Any, ...]:
    q, k, v, out, lse, *rest = ctx.saved_tensors
    kept, params = rest[: ctx.num_kept], rest[ctx.num_kept :]
    dout = torch.zeros_like(out) if dout is None else dout
    need = ctx.held.train_params
    dmemory = dmemory if ctx.held.measure else None
    slopes = dout, dlse, dmemory
    dq, dk, dv, dparams = backward_op(*slopes, q, k, v, out, lse, kept, params, ctx.call, ctx.seed, ctx.batch_offset, need)
    return dq, dk, dv, dparams if need else [None] * len(params), None, None, None


def _refuse(ctx: Any, *grads: object) -> None:
    raise Unsupported("ring_attention has no double backward; take such a gradient with ringctx.testing.dense on one process.")


attention_op.register_autograd(_backward, setup_context=_keep)
backward_op.register_autograd(_refuse)
