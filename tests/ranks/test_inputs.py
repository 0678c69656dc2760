"""What users really pass: strided tensors, expanded gradients, frozen inputs, checkpointing; and memory that holds garbage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringctx import Attention, Layout, Ring, decode_attention, ring_attention
from ringctx import patterns as p
from ringctx.methods.scores import PairBias
from ringctx.testing import dense, errors
from tests.cases import Case, on_rank, problem
from tests.exact import judge, wrong
from tests.pool import Pool

S = 50


def _whole(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, S, h, 16, dtype=torch.float64, generator=generator).to(dtype) for h in (4, 2, 2, 4))  # type: ignore[return-value]


def _views(x: Tensor, how: str) -> Tensor:
    """The same values in another memory order."""
    match how:
        case "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "width first":
            return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        case "packed":
            return torch.stack([x, x + 1], 2)[:, :, 0]
        case "every other":
            return torch.stack([x, x + 1], -1)[..., 0]
    return x


def _strided(ring: Ring, how: str, transport: str) -> dict[str, Tensor]:
    layout = Layout.zigzag(S, ring.size)
    q, k, v, dout = (_views(layout.shard(x, ring.rank), how).requires_grad_() for x in _whole())
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, transport=transport, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def _joined(parts: list[dict[str, Tensor]], layout: Layout) -> dict[str, Tensor]:
    return {name: layout.unshard([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("transport", ["rotate", "fetch", "heads", "pass_q"])
@pytest.mark.parametrize("how", ["heads first", "width first", "packed", "every other"])
def test_strided_tensors(pool: Pool, how: str, transport: str) -> None:
    q, k, v, dout = _whole()
    found = errors(
        dense(Attention(), q, k, v, dout=dout), dout=dout, **_joined(pool.run(_strided, how, transport, size=2), Layout.zigzag(S, 2))
    )
    assert max(found.values()) < 1e-12


def _loss(ring: Ring, kind: str, transport: str) -> dict[str, Tensor]:
    layout = Layout.striped(S, ring.size)
    q, k, v, _ = (layout.shard(x, ring.rank).requires_grad_() for x in _whole())
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, transport=transport, return_lse=True)
    loss = {"sum": lambda: out.sum(), "lse": lambda: lse.sum(), "both": lambda: out.sum() + 2 * lse.sum()}[kind]()
    loss.backward()
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("transport", ["rotate", "fetch", "heads", "pass_q"])
@pytest.mark.parametrize("kind", ["sum", "lse", "both"])
def test_expanded_gradients(pool: Pool, kind: str, transport: str) -> None:
    q, k, v, _ = _whole()
    dout = torch.ones_like(q) * (kind != "lse")
    dlse = torch.ones(q.shape[:3]) * {"sum": 0, "lse": 1, "both": 2}[kind]
    found = errors(
        dense(Attention(), q, k, v, dout=dout, dlse=dlse), **_joined(pool.run(_loss, kind, transport, size=2), Layout.striped(S, 2))
    )
    assert max(found.values()) < 1e-12


def _frozen(ring: Ring, wanted: str) -> dict[str, Tensor | None]:
    layout = Layout.zigzag(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank) for x in _whole())
    given = {"q": q, "k": k, "v": v}
    for name in wanted:
        given[name].requires_grad_()
    ring_attention(q, k, v, ring=ring, layout=layout, transport="rotate").backward(dout)  # type: ignore[union-attr]
    return {f"d{name}": x.grad for name, x in given.items()}


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_some_inputs_want_gradients(pool: Pool, wanted: str) -> None:
    q, k, v, dout = _whole()
    parts = pool.run(_frozen, wanted, size=2)
    assert all((part[f"d{name}"] is not None) == (name in wanted) for part in parts for name in "qkv")
    kept = [{name: x for name, x in part.items() if x is not None} for part in parts]
    assert max(errors(dense(Attention(), q, k, v, dout=dout), dout=dout, **_joined(kept, Layout.zigzag(S, 2))).values()) < 1e-12


def _recomputed(ring: Ring, reentrant: bool) -> list[bool]:
    """Dropout whose seed ring_attention draws itself must be replayed when a checkpoint runs forward again."""
    layout = Layout.zigzag(S, ring.size)
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_() for x in _whole())

        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(dropout=0.4), transport="rotate")
            assert isinstance(out, Tensor)
            return out

        out = checkpoint(block, q, k, v, use_reentrant=reentrant) if recompute else block(q, k, v)
        out.backward(dout.detach())
        found.append((out.detach(), q.grad, k.grad, v.grad))
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_replay_dropout(pool: Pool, reentrant: bool) -> None:
    assert all(all(same) for same in pool.run(_recomputed, reentrant, size=2))


def _poisoned(ring: Any, case: Case) -> dict[str, Any]:
    """The job with NaN in all memory that is not yet written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return on_rank(ring, case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("route", ["rotate", "fetch", "gather", "heads", "pass_q", "usp", "double"])
@pytest.mark.parametrize("pattern", ["causal", "future", "blocks_of_heads", "causal&(window40|sinks4)"])
def test_garbage_in_memory_changes_nothing(pool: Pool, pattern: str, route: str) -> None:
    case = Case(size=4, length=101, layout="zigzag", pattern=pattern, route=route, dtype="fp32", heads=(4, 2), scores="all", lse=True)
    clean = pool.run(on_rank, case, size=4, fold=case.fold)
    dirty = pool.run(_poisoned, case, size=4, fold=case.fold)
    for a, b in zip(clean, dirty, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("out", "lse", "dq", "dk", "dv"))


def _hidden_by_bias(ring: Any, transport: str) -> dict[str, Tensor]:
    layout = Layout.zigzag(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_() for x in _whole())
    attention = Attention(scores=(PairBias(_bias_of_minus_infinity().requires_grad_()),))
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, transport=transport, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def _bias_of_minus_infinity() -> Tensor:
    """(1, S, S): the first keys are hidden from all, row 30 sees nothing at all, and some keys here and there are hidden."""
    bias = torch.randn(1, S, S, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    bias[bias > 1] = -torch.inf
    bias[:, :, :7] = -torch.inf
    bias[:, 30] = -torch.inf
    return bias


@pytest.mark.parametrize("transport", ["rotate", "pass_q"])
def test_a_bias_of_minus_infinity_hides_keys(pool: Pool, transport: str) -> None:
    q, k, v, dout = _whole()
    attention = Attention(scores=(PairBias(_bias_of_minus_infinity()),))
    found = errors(
        dense(attention, q, k, v, dout=dout), dout=dout, **_joined(pool.run(_hidden_by_bias, transport, size=2), Layout.zigzag(S, 2))
    )
    assert max(found.values()) < 1e-12


def _steep(ring: Any) -> dict[str, Tensor]:
    layout = Layout.striped(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank).float() for x in _whole())
    q, k, v = (q * 300).requires_grad_(), k.requires_grad_(), v.requires_grad_()
    out, lse = ring_attention(q, k, v, ring=ring, layout=layout, transport="rotate", return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def test_logits_far_beyond_what_exp_can_hold(pool: Pool) -> None:
    """Logits of several thousand: finite everywhere, and out, lse and dv as exact as fp32 logits of that size allow."""
    q, k, v, dout = (x.float() for x in _whole())
    parts = _joined(pool.run(_steep, size=2), Layout.striped(S, 2))
    assert all(x.isfinite().all() for x in parts.values())
    found = errors(dense(Attention(), q * 300, k, v, dout=dout), dout=dout, out=parts["out"], lse=parts["lse"], dv=parts["dv"])
    assert max(found.values()) < 1e-3 and found["lse"] < 5e-6


def _decoded(ring: Ring, case: Case, n_q: int) -> Tensor:
    given = problem(case)
    k, v = (given.part(x, ring.rank, given.key_layout, given.j) for x in (given.k, given.v))
    with torch.no_grad():
        return decode_attention(given.q[:, -n_q:], k, v, key_layout=given.key_layout, ring=ring, attention=given.attention)


@pytest.mark.parametrize("n_q", [1, 2, 5])
@pytest.mark.parametrize("scores", ["none", "softcap", "alibi", "sink", "rotary"])
@pytest.mark.parametrize("pattern", ["causal", "causal&window9", "causal&(window40|sinks4)", "per_head", "blocks_of_heads", "future"])
def test_decode_is_exact(pool: Pool, pattern: str, scores: str, n_q: int) -> None:
    for layout, keys, size, heads in (("contiguous", "same", 4, (4, 2)), ("striped", "same", 3, (8, 1)), ("zigzag", "one_rank", 2, (2, 2))):
        case = Case(size=size, length=61, layout=layout, pattern=pattern, route="auto", heads=heads, batch=2, scores=scores, keys=keys)
        given = problem(case)
        reference = dense(given.attention, given.q[:, -n_q:], given.k, given.v, i=given.i[-n_q:], j=given.j)
        parts = pool.run(_decoded, case, n_q, size=size)
        assert all(torch.equal(part, parts[0]) for part in parts)
        assert errors(reference, out=parts[0])["out"] < 1e-12


@pytest.mark.parametrize("lengths", [(), (0, 0, 7), (1, 0, 0), (0, 3, 0)], ids=str)
def test_ranks_without_tokens(pool: Pool, lengths: tuple[int, ...]) -> None:
    """Nobody has a token, or one rank alone has."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    layout = Layout(tuple((range(a, a + n),) if n else () for a, n in zip(starts, lengths, strict=True)) or ((), (), ()))
    for route in ("rotate", "fetch", "gather", "heads", "pass_q", "auto"):
        case = Case(size=3, length=sum(lengths), layout=layout, pattern=p.causal(), route=route, heads=(3, 1), scores="sink", lse=True)
        assert not wrong(judge(pool, case)), route
