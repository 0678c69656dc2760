"""ring_attention: the function that people call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.call import Call
from ringctx.core.header import agree
from ringctx.core.layout import Layout
from ringctx.core.operator import attention_op, forget, number_of
from ringctx.core.ring import Ring
from ringctx.core.select import narrowed, select_problem, sight_of
from ringctx.errors import ConfigError, Unsupported

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
    train, train_params = _trained((q, k, v), params)
    selects = attention.select is not None
    if selects:
        call = Call(ring, layout, key_layout, attention, transport, kernel, train)
        problem = call.problem(q, k, v) or select_problem(attention, q, layout.length, train)
        agree(ring, call.facts(q, k, v, "selection", seed or 0, batch_offset), problem)
    q, k = _encoded(attention, q, k, ring.rank, layout, key_layout)
    if selects:
        attention = narrowed(q, k, sight_of(ring, layout, key_layout, attention, k.shape[3]), attention)
    seed = _seed(attention, seed)
    number = number_of(ring, layout, key_layout, attention, transport, kernel, train, train_params)
    out, lse, _, _ = attention_op(q, k, v, params, number, seed, batch_offset)
    if selects:
        forget(ring, number)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Carried:
    """Attention with a carry. out (b s h e) in q's dtype, lse (b s h) and memory (b s) in the accumulation dtype, all differentiable.

    memory: of the earlier keys that a query sees, how many are not forgotten: sum_j 1 - min(F, tau) / tau, as in the memory loss.
    carry: what this rank's keys carry now (b n), None where no carry was given. No gradient flows through it.
    """

    out: Tensor
    lse: Tensor
    memory: Tensor
    carry: Tensor | None = None


def carried_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ring: Ring,
    layout: Layout,
    key_layout: Layout | None = None,
    attention: Attention,
    carry: Tensor | None = None,
    transport: str = "auto",
    kernel: str = "auto",
    seed: int | None = None,
    batch_offset: int = 0,
) -> Carried:
    """`ring_attention` of an attention with a carry, and what the carry says. All ranks must call this together.

    carry (b n), in the accumulation dtype: what this rank's keys were given by queries of earlier calls; then the result has what
    they carry now, and there is no gradient (call it under torch.no_grad()). Everything else is as in `ring_attention`.
    Source: Leviathan, Kalman & Matias 2024 (Selective Attention, arXiv 2410.02703), forward of figure 2; memory: its section on the
    memory loss as two independent implementations have it.
    Raises ConfigError for an attention without a carry, and what ring_attention raises.
    """
    if attention.carry is None:
        raise ConfigError(
            "carried_attention was given an attention without a carry; pass Attention(carry=Selective()), or call ring_attention."
        )
    key_layout = layout if key_layout is None else key_layout
    q, k = _encoded(attention, q, k, ring.rank, layout, key_layout)
    params = attention.params()
    train, train_params = _trained((q, k, v), params)
    seed = _seed(attention, seed)
    number = number_of(ring, layout, key_layout, attention, transport, kernel, train, train_params, True, carry is not None)
    params = params if carry is None else [*params, carry]
    out, lse, memory, kept = attention_op(q, k, v, params, number, seed, batch_offset)
    return Carried(out, lse, memory, None if carry is None else kept[-1])


def _trained(tensors: tuple[Tensor, ...], params: list[Tensor]) -> tuple[bool, bool]:
    """Whether a backward will follow, and whether one that reaches the params."""
    of_params, of_tensors = (torch.is_grad_enabled() and any(x.requires_grad for x in some) for some in (params, tensors))
    return of_params or of_tensors, of_params


def _encoded(attention: Attention, q: Tensor, k: Tensor, rank: int, layout: Layout, key_layout: Layout) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their indices."""
    if attention.encoding is None:
        return q, k
    queries = attention.encoding.queries(q, layout.indices(rank, q.device))
    return queries, attention.encoding.keys(k, key_layout.indices(rank, k.device))


def _seed(attention: Attention, seed: int | None) -> int:
    """Dropout's seed: as given, or drawn from torch's CPU generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()).item()) if attention.dropout else 0
    return seed


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
