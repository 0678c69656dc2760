"""ring_attention: the function that people call."""

from __future__ import annotations

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.call import Call
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.operator import attention_op, forget, number_of
from ringctx.core.ring import Ring
from ringctx.core.select import narrowed, select_problem, sight_of
from ringctx.errors import Unsupported

_DEFAULT = Attention()


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    layout: Layout,
    key_layout: Layout | None = None,
    attention: Attention = _DEFAULT,
    transport: str = "auto",
    kernel: str = "auto",
    return_lse: bool = False,
    seed: int | None = None,
    batch_offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the whole sequence while each rank holds one share of it. All ranks must call this together.

    q (b s h d), k (b n g d), v (b n g e), h a multiple of g, s = layout.count(rank), n = key_layout.count(rank)
      -> out (b s h e) in q's dtype; with return_lse also lse (b s h), fp32 (fp64 for fp64), the sink included, differentiable.
    key_layout: where the keys live, if not where the queries do; it may have gaps. transport: auto rotate fetch gather heads
    pass_q; auto counts bytes. kernel: auto, or one of ringctx.kernels by name. seed: dropout's, equal on all ranks; drawn from
    torch's CPU generator when absent. batch_offset: this batch's place in the global one, for dropout.
    An attention that selects has no backward and takes one sequence (b 1).
    A row that sees nothing gives out 0 and lse -inf. Gradients of the attention's own tensors (sink, bias tables) are this
    rank's share: sum them over the ring, as those of any replicated weight.

    Raises LayoutError (shapes do not fit the layout), Unsupported (no kernel, with every reason), RanksDisagree, RankLost.
    """
    key_layout = layout if key_layout is None else key_layout
    params = attention.params()
    train_params = torch.is_grad_enabled() and any(p.requires_grad for p in params)
    train = train_params or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    selects = attention.select is not None
    if selects:
        call = Call(ring, layout, key_layout, attention, transport, kernel, train)
        problem = call.problem(q, k, v) or select_problem(attention, q, layout.length, train)
        agree(ring, call.facts(q, k, v, "selection", seed or 0, batch_offset), problem)
    if attention.encoding is not None:
        q = attention.encoding.queries(q, layout.indices(ring.rank, q.device))
        k = attention.encoding.keys(k, key_layout.indices(ring.rank, k.device))
    if selects:
        attention = narrowed(q, k, sight_of(ring, layout, key_layout, attention, k.shape[3]), attention)
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if attention.dropout else 0
    number = number_of(ring, layout, key_layout, attention, transport, kernel, train, train_params)
    out, lse, _ = attention_op(q, k, v, params, number, seed, batch_offset)
    if selects:
        forget(ring, number)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    layout: Layout,
    key_layout: Layout | None = None,
    attention: Attention = _DEFAULT,
    transport: str = "auto",
) -> str:
    """How ring_attention would move and compute these tensors on this rank, and why this transport; sends nothing.

    q (b s h d), k (b n g d), v (b n g e); only shapes, dtype and requires_grad matter. Raises LayoutError like ring_attention,
    and Unsupported for an attention that selects.
    """
    if attention.select is not None:
        raise Unsupported(f"{attention.select} chooses keys by an exchange, and explain sends nothing; leave select out.")
    train = any(x.requires_grad for x in (q, k, v))
    call = Call(ring, layout, layout if key_layout is None else key_layout, attention, transport, "auto", train)
    problem = call.problem(q, k, v)
    if problem:
        raise problem
    return call.route(q, k, v).explain()
