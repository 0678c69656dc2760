"""The dense oracle: what any `Attention` means, as one float64 computation on one process, and how far an answer is from it.

Written for clarity, never for speed: whole logits, gradients through torch's autograd, so that nothing is shared with the
formulas of the kernels it judges. Use it to test an attention, a pattern, a score or a kernel of your own:

    reference = dense(attention, q, k, v, dout=dout)                       # whole tensors (b, S, h, d)
    assert errors(reference, out=out, dq=dq, dout=dout)["out"] < 5e-6
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ringctx.errors import Unsupported

if TYPE_CHECKING:
    from ringctx.core.attention import Attention, Encoding
    from ringctx.core.pattern import Pattern

LOGITS_AT_ONCE = 2**23
"""Heads are taken in groups so that one matrix of logits stays near this many numbers (64 MiB)."""

GRADIENT_FLOOR = 1e-3
"""A gradient's error is relative to the larger of its own norm and this share of the norm of `dout`."""


@dataclass(frozen=True)
class Dense:
    """Attention over whole tensors in float64; every tensor is detached.

    out (b, S, h, e), lse (b, S, h): the log of the whole denominator, the sink included; a row that sees nothing has out 0, and
    lse -inf or, if there is a sink, the sink itself.
    dq, dk, dv: shaped like q, k, v; None without `dout` and `dlse`.
    taken, memory: of an attention with a carry: what is subtracted from logits, F (b, S, K), and how many earlier keys each query has
    not forgotten (b, S).
    dparams: gradients of every score's `params()` in the order of `attention.scores`, then of the sink if there is one.
    """

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dparams: tuple[Tensor, ...] = ()
    taken: Tensor | None = None
    memory: Tensor | None = None


@dataclass(frozen=True)
class _Terms:
    """What turns products of queries and keys into probabilities, in float64."""

    scale: float
    elementwise: tuple[Any, ...]
    additive: tuple[Any, ...]
    params: tuple[tuple[Tensor, ...], ...]
    """For each additive score, its parameters."""
    sink: Tensor | None
    normaliser: str
    carry: Any
    firsts: tuple[tuple[int, ...], ...]
    """For each row of the batch, or for all, the first token of each document; carries spare these."""
    dropout: float
    seed: int | None
    batch: Tensor
    i: Tensor
    j: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """Every parameter that may want a gradient: those of the scores in order, then the sink."""
        tail = [] if self.sink is None else [self.sink]
        return [param for params in self.params for param in params] + tail


@dataclass(frozen=True)
class _View:
    """Queries (b, S, h, d) and keys (b, K, g, d) under one encoding, and the pairs seen there: bool (b or 1, h or 1, S, K)."""

    q: Tensor
    k: Tensor
    seen: Tensor


def dense(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    i: Tensor | None = None,
    j: Tensor | None = None,
    seed: int | None = None,
    batch_offset: int = 0,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    dmemory: Tensor | None = None,
) -> Dense:
    """Attention of whole, unencoded q (b, S, h, d), k (b, K, g, d), v (b, K, g, e), and its gradients if `dout` or `dlse` is given.

    i (S,) and j (K,) are the indices of queries and keys, 0.. if absent. dout is shaped like out, dlse like lse, dmemory like memory.
    seed and batch_offset are dropout's, as in `ring_attention`. Raises Unsupported for parts of `Attention` it does not define.
    """
    _refuse(attention, seed)
    backward = not (dout is None and dlse is None and dmemory is None)
    i = torch.arange(q.shape[1]) if i is None else i
    j = torch.arange(k.shape[1]) if j is None else j
    terms = _terms(attention, q, i, j, seed, batch_offset)
    leaves = [x.detach().double().requires_grad_(backward) for x in (q, k, v)]
    views = _views(attention, leaves[0], leaves[1], i, j)
    encoded = [x for view in views for x in (view.q, view.k)]
    cut = [x.detach().requires_grad_(backward) for x in encoded]
    views = [_View(q_, k_, view.seen) for q_, k_, view in zip(cut[::2], cut[1::2], views, strict=True)]

    b, s, h, _ = q.shape
    out, lse = torch.zeros(b, s, h, v.shape[3], dtype=torch.float64), torch.full((b, s, h), -torch.inf, dtype=torch.float64)
    wanted = [leaves[2], *cut, *terms.leaves]
    grads = [torch.zeros_like(x) for x in wanted]
    taken = memory = None
    if attention.carry is not None:
        with torch.set_grad_enabled(backward):
            taken, memory = _taken(terms, views, leaves[2])
        if dmemory is not None:
            new = torch.autograd.grad(memory, wanted, dmemory.double(), allow_unused=True, retain_graph=True)
            grads = [old if one is None else old + one for old, one in zip(grads, new, strict=True)]
    group = max(1, LOGITS_AT_ONCE // max(1, b * s * len(j)))
    for heads in torch.arange(h).split(group):
        with torch.set_grad_enabled(backward):
            some, log = _heads(terms, views, leaves[2], heads, taken)
        out[:, :, heads], lse[:, :, heads] = some.detach(), log.detach()
        if backward:
            ends = [(some, dout), (log, dlse)]
            pairs = [(y, dy[:, :, heads].double()) for y, dy in ends if dy is not None and y.requires_grad]
            if pairs:
                new = torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True, retain_graph=True)
                grads = [old if one is None else old + one for old, one in zip(grads, new, strict=True)]
    carried = tuple(x if x is None else x.detach() for x in (taken, memory))
    if not backward:
        return Dense(out, lse, None, None, None, (), *carried)
    parts = grads[1 : 1 + len(cut)]
    dq, dk = (
        sum((_through(leaf, x, dx) for x, dx in zip(encoded[n::2], parts[n::2], strict=True)), torch.zeros_like(leaf))
        for n, leaf in enumerate(leaves[:2])
    )
    return Dense(out, lse, dq, dk, grads[0], tuple(grads[1 + len(cut) :]), *carried)


def _views(attention: Attention, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> list[_View]:
    """What the attention sees: as one view, or one for each branch."""
    parts: list[tuple[Encoding | None, Pattern]] = [(attention.encoding, attention.pattern)]
    if attention.branches:
        parts = [(branch.encoding, attention.pattern & branch.pattern) for branch in attention.branches]
    encoded = [(q, k) if encoding is None else (encoding.queries(q, i), encoding.keys(k, j)) for encoding, _ in parts]
    return [_View(q_, k_, _four(pattern.allows(i, j))) for (q_, k_), (_, pattern) in zip(encoded, parts, strict=True)]


def _logits(terms: _Terms, views: list[_View], heads: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with their scores, and who is seen, (b, n, S, K) both, of these n heads, which read key heads `shared`.

    A pair's logit is that of the one view that sees it.
    """
    logits, seen = torch.zeros((), dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    for view in views:
        sees = view.seen[:, heads] if view.seen.shape[1] > 1 else view.seen
        products = torch.einsum("bqhd,bkhd->bhqk", view.q[:, :, heads], view.k[:, :, shared]) * terms.scale
        logits, seen = (products if len(views) == 1 else torch.where(sees, products, logits)), seen | sees
    for score in terms.elementwise:
        logits = score.apply(logits)
    for score, params in zip(terms.additive, terms.params, strict=True):
        logits = logits + score.bias(heads, terms.i, terms.j, params)
    return logits, seen & ~logits.isneginf()  # a bias of -inf hides a key as a pattern does


def _taken(terms: _Terms, views: list[_View], v: Tensor) -> tuple[Tensor, Tensor]:
    """F (b, S, K): what head 0 of all earlier queries gave each key; and of each query's earlier keys how many F leaves, (b, S)."""
    head = torch.zeros(1, dtype=torch.int64)
    logits, seen = _logits(terms, views, head, head)
    first = torch.stack([torch.isin(terms.j, torch.tensor(row)) for row in terms.firsts])
    earlier = seen[:, 0] & (terms.j < terms.i[:, None])
    given = terms.carry.gives(logits[:, 0].masked_fill(~seen[:, 0], -torch.inf)).where(earlier & ~first[:, None], 0.0)
    order = terms.i.argsort()
    sums = given[:, order].cumsum(1) - given[:, order]
    taken = sums[:, order.argsort()]
    memory = (1 - taken.clamp(max=terms.carry.tau) / terms.carry.tau).where(earlier, 0.0).sum(2)
    return taken, memory


def _heads(terms: _Terms, views: list[_View], v: Tensor, heads: Tensor, taken: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (b, S, n, e) and lse (b, S, n) of these n heads."""
    shared = heads // (views[0].q.shape[2] // v.shape[2])
    v = v[:, :, shared]
    logits, seen = _logits(terms, views, heads, shared)
    if taken is not None:
        logits = logits - taken[:, None]
    if terms.sink is not None:
        logits = torch.cat([logits, terms.sink[heads, None, None].expand(*logits.shape[:3], 1)], -1)
        seen = torch.cat([seen, seen.new_ones(*seen.shape[:3], 1)], -1)
    alive = seen.any(-1, keepdim=True)
    # A row without any key has logits 0 here, so that no -inf meets a -inf; `where` then cuts it off from every gradient.
    logits = logits.masked_fill(~seen & alive, -torch.inf).where(alive, 0.0)
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else logits.new_zeros(logits.shape[:3])
    weights = (torch.softmax(logits, -1) if terms.normaliser == "softmax" else logits.exp()).where(seen, 0.0)[..., : v.shape[1]]
    if terms.dropout:
        from ringctx.core.dropout import keep

        assert terms.seed is not None
        weights = weights * keep(terms.dropout, terms.seed, terms.batch, heads, terms.i, terms.j).double()
    out = torch.einsum("bhqk,bkhe->bqhe", weights, v)
    return out, lse.where(alive[..., 0], -torch.inf).transpose(1, 2)


def error(x: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """||x - reference|| / max(||reference||, floor), Frobenius norms in float64; inf where NaNs or infinities differ.

    Infinite entries of the reference (the lse of a row that sees nothing) must be equal in x and are left out of the norms.
    Raises ValueError if the shapes differ.
    """
    if x.shape != reference.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, its reference {tuple(reference.shape)}; compare whole tensors of equal shape.")
    x, reference = x.detach().double(), reference.detach().double()
    infinite = reference.isinf()
    if not torch.equal(x[infinite], reference[infinite]) or not bool(x[~infinite].isfinite().all()):
        return float("inf")
    distance = float((x[~infinite] - reference[~infinite]).norm())
    size = max(float(reference[~infinite].norm()), floor)
    return 0.0 if distance == 0 else distance / size if size else float("inf")


def errors(reference: Dense, *, dout: Tensor | None = None, dparams: Sequence[Tensor] = (), **got: Tensor) -> dict[str, float]:
    """The `error` of each named tensor: out, lse, dq, dk, dv, and dparams as dparams0, dparams1 ...

    A gradient's is relative to at least GRADIENT_FLOOR x ||dout||. Rows that see nothing must have out exactly 0.
    """
    size = 0.0 if dout is None else float(dout.detach().double().norm())
    found = {}
    for name, x in got.items():
        expected = getattr(reference, name)
        if expected is None:
            raise ValueError(f"the reference has no {name}; call dense(..., dout=...) to get gradients.")
        found[name] = error(x, expected, GRADIENT_FLOOR * size if name in ("dq", "dk", "dv") else 0.0)
    if "out" in got and bool(got["out"].detach()[reference.lse.isneginf()].any()):
        found["out"] = float("inf")
    for n, (x, expected) in enumerate(zip(dparams, reference.dparams, strict=bool(dparams))):
        found[f"dparams{n}"] = error(x, expected, GRADIENT_FLOOR * size)
    return found


def golden_inputs(b: int = 1, h: int = 2, n: int = 64, d: int = 8, g: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout (b, n, h, d) in float64 from a closed form without random numbers, the same on every machine; g heads in k, v."""
    return tuple(_closed_form(b, heads, n, d, phase) for heads, phase in ((h, 0.1), (g or h, 0.2), (g or h, 0.3), (h, 1.7)))  # type: ignore[return-value]


def _closed_form(b: int, h: int, n: int, d: int, phase: float) -> Tensor:
    """(b, n, h, d): sin(0.7 n + 1.3 d + 0.5 h + 0.9 b + phase) + 0.5 cos(0.31 n (d + 1) + phase)."""
    batch, token, head, dim = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in (b, n, h, d)), indexing="ij")
    return torch.sin(0.7 * token + 1.3 * dim + 0.5 * head + 0.9 * batch + phase) + 0.5 * torch.cos(0.31 * token * (dim + 1) + phase)


def _terms(attention: Attention, q: Tensor, i: Tensor, j: Tensor, seed: int | None, batch_offset: int) -> _Terms:
    """Sort the scores into elementwise and additive, and lift every parameter to a float64 leaf."""
    additive = tuple(score for score in attention.scores if hasattr(score, "bias"))
    elementwise = tuple(score for score in attention.scores if not hasattr(score, "bias"))

    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    params = tuple(tuple(leaf(param) for param in score.params()) for score in additive)
    sink = None if attention.sink is None else leaf(attention.sink)
    scale = q.shape[3] ** -0.5 if attention.scale is None else attention.scale
    batch = torch.arange(q.shape[0]) + batch_offset
    firsts: tuple[tuple[int, ...], ...] = ((0,),)
    if attention.carry is not None:
        from ringctx.core.carry import first_tokens

        firsts = first_tokens(attention.pattern)
    return _Terms(
        scale, elementwise, additive, params, sink, attention.normaliser, attention.carry, firsts, attention.dropout, seed, batch, i, j
    )


def _through(leaf: Tensor, encoded: Tensor, grad: Tensor) -> Tensor:
    """Carry the gradient of an encoded tensor back to the leaf it was made from."""
    if encoded is leaf:
        return grad
    back = torch.autograd.grad(encoded, leaf, grad, allow_unused=True)[0]
    return torch.zeros_like(leaf) if back is None else back


def _four(seen: Tensor) -> Tensor:
    """A pattern's (q, k), (h, q, k) or (b, h, q, k) as (b|1, h|1, q, k)."""
    return seen[(None,) * (4 - seen.dim())]


def _refuse(attention: Attention, seed: int | None) -> None:
    """Say which parts of this attention the oracle does not define."""
    parts = {"select": attention.select}
    wrong = [f"{name}={value!r}" for name, value in parts.items() if value]
    if attention.normaliser not in ("softmax", "sum"):
        wrong.append(f"normaliser={attention.normaliser!r}")
    if wrong:
        raise Unsupported(f"The dense oracle was asked for {', '.join(wrong)}; it defines everything but select and other normalisers.")
    if attention.dropout and seed is None:
        raise Unsupported(
            f"The dense oracle was asked for dropout {attention.dropout} without a seed; pass the seed that ring_attention got."
        )
