"""To torch, ring attention is one operator: torch.compile, checkpointing, modules and a drop-in for SDPA."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ringctx import Attention, Layout, Ring, RingAttention, Unsupported, explain, ring_attention, ring_sdpa
from ringctx.methods.branches import Branches, rerope
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, full, window
from ringctx.testing import dense, error

S, H, G, D = 37, 4, 2, 16
PATTERN = causal() & window(20)


def whole(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, S, n, D, generator=generator, dtype=torch.float64) for n in (H, G, G, H)]


def shards(ring: Ring) -> tuple[Layout, list[torch.Tensor]]:
    layout = Layout.zigzag(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank) for x in whole())
    return layout, [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def grads_of(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out.backward(tensors[3])
    taken = [x.grad.clone() for x in tensors[:3] if x.grad is not None]
    for x in tensors[:3]:
        x.grad = None
    return [out.detach(), *taken]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def compiled(ring: Ring, transport: str, branches: Branches) -> None:
    layout, tensors = shards(ring)
    attention = Attention(PATTERN, branches=branches)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * ring_attention(q * 1.5, k, v, ring=ring, layout=layout, attention=attention, transport=transport)

    eager = grads_of(step(*tensors[:3]), tensors)
    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    equal(grads_of(fast(*tensors[:3]), tensors), eager)


@pytest.mark.parametrize(("transport", "branches"), [("rotate", ()), ("heads", ()), ("pass_q", ()), ("rotate", rerope(9, Rotary((0.5,))))])
def test_compile_makes_one_graph_of_it_forward_and_backward(pool, transport, branches):
    pool.run(compiled, transport, branches, size=2)


def test_a_ring_keeps_few_of_many_ways_of_calling_and_backward_finds_its_own():
    ring, (q, k, v, dout) = Ring.alone(), whole()
    q.requires_grad_()
    layout = Layout.zigzag(S, 1)
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(causal() & window(5)))
    for n in range(600):
        ring_attention(q, k, v, ring=ring, layout=layout, attention=Attention(causal() & window(n + 6)))
    assert len(ring.kept) <= 256
    out.backward(dout)
    assert error(q.grad, dense(Attention(causal() & window(5)), q, k, v, dout=dout).dq) < 1e-12


def checkpointed(ring: Ring, transport: str, dropout: float) -> tuple[int, int]:
    layout, tensors = shards(ring)
    attention = Attention(PATTERN, dropout=dropout)
    step = lambda q, k, v: ring_attention(q, k, v, ring=ring, layout=layout, attention=attention, transport=transport).sin()
    torch.manual_seed(3)
    plain = grads_of(step(*tensors[:3]), tensors)
    torch.manual_seed(3)
    before = ring.calls
    equal(grads_of(checkpoint(step, *tensors[:3], use_reentrant=False), tensors), plain)
    recomputed = ring.calls - before
    save = lambda _, op, *__, **___: (
        CheckpointPolicy.MUST_SAVE if op == torch.ops.ringctx.attention.default else CheckpointPolicy.PREFER_RECOMPUTE
    )
    torch.manual_seed(3)
    before = ring.calls
    saved = checkpoint(step, *tensors[:3], use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(save))
    equal(grads_of(saved, tensors), plain)
    return recomputed, ring.calls - before


@pytest.mark.parametrize(("transport", "dropout"), [("rotate", 0.0), ("fetch", 0.3), ("heads", 0.3)])
def test_checkpointing_recomputes_the_same_or_keeps_out_and_lse(pool, transport, dropout):
    assert set(pool.run(checkpointed, transport, dropout, size=2)) == {(3, 2)}  # forward, (forward again,) backward


def twice_differentiated(ring: Ring) -> str:
    layout, (q, k, v, _) = shards(ring)
    out = ring_attention(q, k, v, ring=ring, layout=layout)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(Unsupported) as refusal:
        dq.sum().backward()
    return str(refusal.value)


def test_double_backward_is_refused(pool):
    assert all("no double backward" in sentence for sentence in pool.run(twice_differentiated, size=2))


def as_module(ring: Ring) -> None:
    layout, tensors = shards(ring)
    sink = torch.nn.Parameter(torch.linspace(-1, 1, H, dtype=torch.float64))
    module = RingAttention(ring, layout, Attention(PATTERN, sink=sink))
    assert [p.shape for p in module.parameters()] == [(H,)]
    ours = grads_of(module(*tensors[:3]), tensors)
    q, k, v, dout = whole()
    truth = dense(Attention(PATTERN, sink=sink), q, k, v, dout=dout)
    for got, want in zip(ours, (truth.out, truth.dq, truth.dk, truth.dv), strict=True):
        assert error(got, layout.shard(want, ring.rank)) < 1e-12
    assert sink.grad is not None
    total = sink.grad.clone()
    if ring.group is not None:
        torch.distributed.all_reduce(total, group=ring.group)
    assert error(total, truth.dparams[-1]) < 1e-12


@pytest.mark.parametrize("size", [1, 3])
def test_a_module_holds_its_sink_as_a_parameter(pool, size):
    pool.run(as_module, size=size)


def like_sdpa(ring: Ring, is_causal: bool) -> float:
    layout = Layout.zigzag(S, ring.size)
    q, k, v, _ = whole()
    sdpa = ring_sdpa(ring, layout)
    mine = [layout.shard(x, ring.rank).transpose(1, 2) for x in (q, k, v)]
    with pytest.raises(Unsupported, match="leave attn_mask out"):
        sdpa(*mine, attn_mask=torch.ones(S, S))
    with pytest.raises(Unsupported, match="enable_gqa"):
        sdpa(*mine)
    views = (x.transpose(1, 2) for x in (q, k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(*views, is_causal=is_causal, enable_gqa=True)
    return error(sdpa(*mine, is_causal=is_causal, enable_gqa=True), layout.shard(truth, ring.rank, dim=2))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_drop_in_for_sdpa_answers_like_it(pool, is_causal):
    assert max(pool.run(like_sdpa, is_causal, size=2)) < 1e-12


def explained(ring: Ring) -> str:
    layout, (q, k, v, _) = shards(ring)
    before = ring.traffic.sent.copy()
    text = explain(q, k, v, ring=ring, layout=layout, attention=Attention(full()))
    assert ring.traffic.sent == before
    return text


def test_explain_says_which_transport_and_why_and_sends_nothing(pool):
    for text in pool.run(explained, size=2):
        assert "rule: fewest bytes" in text
        assert "→" in text


def test_a_ring_that_its_owner_dropped_lives_until_the_backward():
    q, k, v, dout = (x.requires_grad_() for x in whole())
    out = ring_attention(q, k, v, ring=Ring.alone(), layout=Layout.contiguous(S, 1))
    gc.collect()
    grads = torch.autograd.grad(out, (q, k, v), dout.detach())
    assert all(bool(grad.isfinite().all()) for grad in grads)
