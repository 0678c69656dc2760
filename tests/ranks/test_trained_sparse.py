"""NSA, DSA's indexer, Star Attention, APB: golden values, what an indexer learns, what travels, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, ConfigError, Layout, LayoutError, RanksDisagree, Ring, Unsupported, ring_attention
from ringctx.methods.apb import PassingBlocks, RetainingHead
from ringctx.methods.forgetting_gate import forgetting_attention
from ringctx.methods.indexer import Indexed, LightningIndexer, index_scores, indexed_attention, indexer_loss
from ringctx.methods.longformer import dilated_attention, longformer_attention
from ringctx.methods.nsa import NativeSparse
from ringctx.patterns import star
from ringctx.testing import _closed_form, error, golden_inputs
from tests.methods.whole import causal, logits_of, softmax_attention
from tests.pool import Pool

N = 64
ALONE: dict[str, Any] = {"ring": Ring.alone(), "layout": Layout.contiguous(N, 1)}


def test_nsa_golden() -> None:
    q, k, v, _ = golden_inputs()
    gates = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).expand(1, N, 2, 3)
    out = NativeSparse(8, 3, 8).attend(q, k[:, :, :1], v[:, :, :1], gates, **ALONE)
    assert out[0, 63, 0, :4].tolist() == pytest.approx([0.392275, 0.578192, 0.074911, -0.591249], abs=1e-6)
    assert out[0, 3, 0, :4].tolist() == pytest.approx([0.822490, -0.149266, -0.910507, -0.503831], abs=1e-6)
    only = NativeSparse(8, 3, 8).attend(q, k[:, :, :1], v[:, :, :1], torch.tensor([1.0, 0, 0]).expand(1, N, 2, 3), **ALONE)
    assert not only[0, :7].any() and only[0, 7].any()  # the first block is compressed when its last token is there


def test_the_indexers_golden() -> None:
    q, k = _closed_form(1, 2, N, 4, 0.5)[0], _closed_form(1, 1, N, 4, 0.6)[0, :, 0]
    w = torch.sin(0.3 * torch.arange(N, dtype=torch.float64)[:, None] + torch.arange(2)) / (2**0.5 * 2)
    scores = index_scores(q, k, w)
    assert scores[63, :4].tolist() == pytest.approx([0.735173, 1.242618, 1.155433, 0.300368], abs=1e-6)
    query, keys, values, _ = golden_inputs()
    seen = causal(N).clone()
    seen[63] = torch.isin(torch.arange(N), torch.tensor([1, 2, 18, 19, 28, 37, 38, 63]))
    out = indexed_attention(query, keys, values, Indexed(q[None], k[None], w[None]), top=8, **ALONE)
    assert error(out[:, 63], softmax_attention(query, keys, values, seen)[:, 63]) < 1e-12


def index_of() -> tuple[LightningIndexer, Tensor]:
    """An indexer, and the tokens that it sees: here what queries and keys are made of."""
    torch.manual_seed(0)
    q, k, _, _ = golden_inputs(2, 4, N, 8, 2)
    return LightningIndexer(48, 3, 8).double(), torch.cat([q.flatten(2), k.flatten(2)], -1)


def losses(ring: Ring, top: int | None, steps: int = 1) -> tuple[list[float], list[Tensor]]:
    """This rank's share of the loss at each step of learning, and of the first step's gradients."""
    index, x = index_of()
    layout, first = Layout.zigzag(N, ring.size), []
    at = layout.indices(ring.rank)
    q, k, _, _ = (layout.shard(y, ring.rank) for y in golden_inputs(2, 4, N, 8, 2))
    optimizer, found = torch.optim.Adam(index.parameters(), 0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = indexer_loss(2 * q, k, index(x[:, at], at), ring=ring, layout=layout, top=top)
        loss.backward()
        first = first or [p.grad.clone() for p in index.parameters() if p.grad is not None]
        optimizer.step()
        found.append(float(loss.detach()))
    return found, first


@pytest.mark.parametrize("top", [None, 9])
def test_ranks_measure_the_indexer_as_one_does(pool: Pool, top: int | None) -> None:
    index, x = index_of()
    q, k, _, _ = golden_inputs(2, 4, N, 8, 2)
    target = logits_of(2 * q, k).masked_fill(~causal(N), -torch.inf).softmax(-1).mean(1)
    want = torch.zeros((), dtype=torch.float64)
    for row, said in enumerate(target):
        of = index(x, torch.arange(N))
        for t in range(N):
            scores = index_scores(of.q[row, t : t + 1], of.k[row, : t + 1], of.w[row, t : t + 1])[0]
            kept = scores.detach().float().sort(descending=True, stable=True).indices[:top]
            p = said[t, kept] / said[t, kept].sum()
            want = want + (p * (p.log() - scores[kept].log_softmax(0))).sum()
    want.backward()
    for size in (1, 2, 3):
        parts = pool.run(losses, top, size=size) if size > 1 else [losses(Ring.alone(), top)]
        assert sum(part[0][0] for part in parts) == pytest.approx(float(want.detach()), rel=1e-12)
        for n, p in enumerate(index.parameters()):
            assert p.grad is not None and error(torch.stack([part[1][n] for part in parts]).sum(0), p.grad) < 1e-10


def test_an_indexer_learns_what_attention_says() -> None:
    found, _ = losses(Ring.alone(), None, steps=60)
    assert found[-1] < 0.5 * found[0]


def sent(ring: Ring) -> dict[str, int]:
    """What one forward of NSA sends from this rank."""
    layout = Layout.contiguous(N, ring.size)
    q, k, v, _ = (layout.shard(x, ring.rank) for x in golden_inputs(1, 4, N, 8, 2))
    ring.traffic.reset()
    with torch.no_grad():
        NativeSparse(8, 2, 4).attend(q, k, v, torch.ones(*q.shape[:3], 3), ring=ring, layout=layout, transport="fetch")
    return dict(ring.traffic.sent)


def test_nsa_sends_a_row_a_block_then_chosen_blocks_and_the_window(pool: Pool) -> None:
    first, last = pool.run(sent, size=2)
    means, bits = 4 * 2 * 2 * 8 * 8, 32 * 4  # four blocks of keys and values, 2 heads of 8 float64; a byte a query and head
    assert first["selection"] == last["selection"] == means + bits
    token = 2 * 2 * 8 * 8
    assert 3 * token < first["keys"] <= (32 + 3) * token and not last.get("keys")  # some blocks, 3 keys of the window; nothing goes up


def test_nsa_without_every_key_is_refused() -> None:
    q, k, v, _ = golden_inputs()
    with pytest.raises(LayoutError, match="NSA takes means of whole blocks, and the keys' layout has gaps"):
        NativeSparse(8, 3, 8).attend(
            q,
            k[:, ::2],
            v[:, ::2],
            torch.ones(1, N, 2, 3),
            ring=Ring.alone(),
            layout=ALONE["layout"],
            key_layout=Layout(((range(0, N, 2),),)),
        )
    with pytest.raises(LayoutError, match="pass key_layout"):
        NativeSparse().attend(q, k, v, torch.ones(1, N, 2, 3), ring=Ring.alone(), layout=None)
    with pytest.raises(ConfigError, match="blocks"):
        NativeSparse(blocks=0)


def test_star_is_blocks_beside_their_anchor_and_then_a_merge() -> None:
    """The authors' two phases: blocks of context over [first block, own block] by themselves, then the question over all by lse."""
    q, k, v, _ = golden_inputs(1, 4, N, 8, 2)
    context, block = 48, 16
    got = ring_attention(q, k, v, attention=Attention(pattern=star(block, context)), **ALONE)
    for first in range(0, context, block):
        at = torch.tensor(sorted({*range(block), *range(first, first + block)}))
        phase_one = softmax_attention(q[:, at], k[:, at], v[:, at], causal(len(at)))
        assert isinstance(got, Tensor) and error(got[:, first : first + block], phase_one[:, -block:]) < 1e-12
    parts, sums = [], []
    for keys in (slice(0, 24), slice(24, 48), slice(48, N)):
        logits = logits_of(q[:, context:], k[:, keys])
        logits = logits if keys.start < context else logits.masked_fill(~causal(N - context), -torch.inf)
        sums.append(logits.logsumexp(-1))
        parts.append(torch.einsum("bhij,bjhe->bihe", logits.softmax(-1), v[:, keys].repeat_interleave(2, 2)))
    weights = torch.stack(sums).softmax(0).transpose(2, 3).unsqueeze(-1)
    assert error(got[:, context:], (weights * torch.stack(parts)).sum(0)) < 1e-12


def test_retaining_heads_say_one_number_a_key_head_and_nonsense_is_refused() -> None:
    torch.manual_seed(0)
    q, k, v, _ = golden_inputs(1, 4, N, 8, 2)
    head = RetainingHead(4, 2, 8, 8, hidden=16).double()
    scores = head(q, k, v)
    assert scores.shape == (1, N, 2)
    others = [torch.cat([x[:, :5], x[:, 5:].flip(1)], 1) for x in (q, k, v)]  # as many: matrix products may round by their shape
    assert torch.equal(head(*others)[:, :5], scores[:, :5]) and not torch.equal(head(*others), scores)
    how = PassingBlocks(16, 4, 3, 48)
    with pytest.raises(Unsupported, match="not a number"):
        how.attend(q, k, v, scores * torch.nan, **ALONE)
    with pytest.raises(ConfigError, match="passing"):
        PassingBlocks(16, 4, 0, 48)


def test_tokens_and_reaches_that_are_not_there_are_refused() -> None:
    q, k, v, _ = golden_inputs(1, 4, N, 8, 2)
    with pytest.raises(LayoutError, match="0 to 63 here, and 64 is not there"):
        longformer_attention((q, k, v), (q, k, v), tokens={64}, window=3, **ALONE)
    with pytest.raises(ConfigError, match=r"indexed_attention\(top=...\) was given 0"):
        indexed_attention(q, k, v, Indexed(q, k[:, :, 0], q[..., 0]), top=0, **ALONE)
    with pytest.raises(ConfigError, match="no reaches"):
        dilated_attention(q, k, v, reaches=(), **ALONE)


def everything(ring: Ring, length: int, kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """This rank's outs of every function here, the gradients of its q, k, v, and its share of the indexer's."""
    torch.manual_seed(0)
    layout, index = getattr(Layout, kind)(length, ring.size), LightningIndexer(12, 3, 4).double()
    at = layout.indices(ring.rank)
    q, k, v = (torch.randn(2, length, h, 8, dtype=torch.float64)[:, at].requires_grad_() for h in (4, 2, 2))
    gates, fading, scores, x = (torch.rand(2, length, *tail, dtype=torch.float64)[:, at] for tail in ((4, 3), (4,), (2,), (12,)))
    said, where = index(x, at), {"ring": ring, "layout": layout}
    outs = [
        NativeSparse(3, 2, 2).attend(q, k, v, gates, **where),
        indexed_attention(q, k, v, said, top=3, **where),
        PassingBlocks(2, 1, 1, max(1, length - 1)).attend(q, k, v, scores, **where),
        dilated_attention(q, k, v, reaches=((2, 1), (4, 2)), **where),
        longformer_attention((q, k, v), (q, k, v), tokens={0}, window=1, **where),
        forgetting_attention(q, k, v, -fading, **where),
    ]
    (torch.stack([out.square().sum() for out in outs]).sum() + indexer_loss(q, k, said, **where)).backward()
    zeros = lambda some: [torch.zeros_like(one) if one.grad is None else one.grad for one in some]
    return [out.detach() for out in outs], zeros((q, k, v)), zeros(index.parameters())


@pytest.mark.parametrize(("length", "size", "kind"), [(1, 3, "zigzag"), (3, 4, "contiguous"), (5, 3, "striped")])
def test_ranks_without_tokens_take_part_forward_and_backward(pool: Pool, length: int, size: int, kind: str) -> None:
    wanted, parts = everything(Ring.alone(), length, "contiguous"), pool.run(everything, length, kind, size=size)
    layout = getattr(Layout, kind)(length, size)
    for which in (0, 1):
        for n, want in enumerate(wanted[which]):
            assert torch.allclose(layout.unshard([part[which][n] for part in parts]), want, rtol=1e-10, atol=1e-10)
    for n, want in enumerate(wanted[2]):
        assert torch.allclose(torch.stack([part[2][n] for part in parts]).sum(0), want, rtol=1e-10, atol=1e-12)


def disagreement(ring: Ring) -> str:
    layout = Layout.contiguous(N, ring.size)
    q, k, v, _ = (layout.shard(x, ring.rank) for x in golden_inputs(1, 4, N, 8, 2))
    with pytest.raises(RanksDisagree) as refused:
        NativeSparse(8, 3 + ring.rank, 8).attend(q, k, v, torch.ones(*q.shape[:3], 3), ring=ring, layout=layout)
    return str(refused.value)


def test_ranks_that_were_asked_otherwise_say_so_before_anything_moves(pool: Pool) -> None:
    assert all("blocks=3" in said and "blocks=4" in said and "on rank 1" in said for said in pool.run(disagreement, size=2))
    q, k, v, _ = golden_inputs(1, 4, N, 8, 2)
    with pytest.raises(LayoutError, match="q has 64 tokens, but the layout gives rank 0 60"):
        dilated_attention(q, k, v, reaches=((2, 1),), ring=Ring.alone(), layout=Layout.contiguous(60, 1))


def test_what_was_chosen_is_planned_once_and_dropped() -> None:
    ring, layout = Ring.alone(), ALONE["layout"]
    q, k, v, _ = golden_inputs(1, 4, N, 8, 2)
    for step in range(5):
        q = q.roll(1, 1).detach().requires_grad_()
        out = NativeSparse(8, 2, 8).attend(q, k, v, torch.ones(1, N, 4, 3, dtype=torch.float64), ring=ring, layout=layout)
        kept = len(ring.kept)
        out.sum().backward()
        assert kept == 1 and len(ring.kept) == 1, step  # the window's call, which every step shares
