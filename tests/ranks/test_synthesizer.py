"""Synthesizer: tables of pairs of indices, factors of them, the query's token alone, and mixtures with dot products, over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ringctx import Attention, Layout, Ring
from ringctx.core.header import share
from ringctx.errors import LayoutError
from ringctx.methods import synthesizer
from ringctx.methods.encodings import Coca
from ringctx.methods.rotary import Rotary
from ringctx.testing import dense, error, golden_inputs
from tests.pool import Pool

S, N, H, D = 41, 50, 3, 8
ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))
ATTENTIONS = {"plain": Attention(), "rotary": Attention(encoding=ROTARY), "coca": Attention(encoding=Coca(rotary=ROTARY))}
Made = tuple[nn.Module, Callable[..., Tensor]]


def made(kind: str) -> Made:
    """A module, and what computes out from it and this rank's q, k, v."""
    torch.manual_seed(0)
    if kind in ("random", "factorised"):
        table: Any = synthesizer.Random(H, N) if kind == "random" else synthesizer.FactorisedRandom(H, N, 4)
        table = table.double()
        return table, lambda q, k, v, **where: synthesizer.synthesise(v, table, transport="rotate", **where)
    if kind == "dense":
        module = synthesizer.Dense(H * D, H, N, 6).double()
        return module, lambda q, k, v, **where: module(q.flatten(2), v, **where)
    name, _, table_kind = kind.partition("+")
    of = synthesizer.Random(H, N) if table_kind == "random" else synthesizer.FactorisedRandom(H, N, 4)
    mixture = synthesizer.Mixture(of).double()
    nn.init.constant_(mixture.alpha, 0.4)
    return mixture, lambda q, k, v, **where: mixture(q, k, v, attention=ATTENTIONS[name], **where)


def logits(kind: str, module: Any, q: Tensor, k: Tensor) -> Tensor:
    """(b h S S) by the paper's words."""
    table = lambda of: of.table[:, :S, :S] if hasattr(of, "table") else (of.left @ of.right.mT)[:, :S, :S]
    if kind in ("random", "factorised"):
        return table(module).expand(len(q), -1, -1, -1)
    if kind == "dense":
        return torch.einsum("bihr,hjr->bhij", module.inward(q.flatten(2)).relu().unflatten(-1, (H, 6)), module.keys[:, :S])
    encoding, at, weight = ATTENTIONS[kind.partition("+")[0]].encoding, torch.arange(S), module.alpha.sigmoid()
    if encoding is not None:
        q, k = encoding.queries(q, at), encoding.keys(k, at)
    return (1 - weight) * torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5 + weight * table(module.table)


def computed(ring: Ring, kind: str, layout_kind: str) -> tuple[list[Tensor], dict[str, Tensor], dict[str, int]]:
    """This rank's out, dq, dk, dv, its share of the parameters' gradients, and what it sent forward."""
    module, run = made(kind)
    layout = getattr(Layout, layout_kind)(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_(n < 3) for n, x in enumerate(golden_inputs(2, H, S, D)))
    ring.traffic.reset()
    out = run(q, k, v, ring=ring, layout=layout)
    sent = dict(ring.traffic.sent)
    out.backward(dout)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
    return [out.detach(), *grads], {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, sent


KINDS = ("random", "factorised", "dense", "plain+random", "rotary+factorised", "coca+random")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "layout_kind"), [(1, "contiguous"), (2, "zigzag"), (3, "striped")])
def test_it_is_the_definition_on_any_ranks(pool: Pool, size: int, layout_kind: str, kind: str) -> None:
    module, _ = made(kind)
    q, k, v, dout = golden_inputs(2, H, S, D)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weights = logits(kind, module, q, k).masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    out.backward(dout)
    layout = getattr(Layout, layout_kind)(S, size)
    parts = pool.run(computed, kind, layout_kind, size=size) if size > 1 else [computed(Ring.alone(), kind, layout_kind)]
    wanted = [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]
    for n, want in enumerate(wanted):
        found = layout.unshard([part[0][n] for part in parts])
        assert error(found, want) < 1e-12 if want.any() else not found.any()
    for name, p in module.named_parameters():
        assert p.grad is not None and error(torch.stack([part[1][name] for part in parts]).sum(0), p.grad) < 1e-11, name
    if size == 2 and kind in ("random", "factorised"):  # the other rank's values, once, where it needs them; no keys
        assert all(0 < part[2]["keys"] <= 2 * -(-S // 2) * H * D * 8 for part in parts)


def test_a_fixed_table_stays_and_a_sequence_beyond_it_is_refused() -> None:
    assert not [p for p in synthesizer.Random(H, N, fixed=True).parameters() if p.requires_grad]
    v, (_, run) = golden_inputs(1, H, N + 1, D)[2], made("random")
    with pytest.raises(LayoutError, match="51 tokens, and the table ends at 50"):
        run(v, v, v, ring=Ring.alone(), layout=Layout.contiguous(N + 1, 1))


@pytest.mark.parametrize("tables", [1, H])
def test_the_oracle_takes_factors_of_a_table(tables: int) -> None:
    table = synthesizer.FactorisedRandom(tables, S, 4).double()
    q, k, v, dout = golden_inputs(1, H, S, D)
    found = dense(Attention(scores=(table.score(),)), q, k, v, dout=dout)
    whole = torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5 + (table.left @ table.right.mT)
    weights = whole.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.einsum("bhij,bjhd->bihd", weights, v).backward(dout)
    for ours, theirs in zip(found.dparams, (table.left.grad, table.right.grad), strict=True):
        assert theirs is not None and error(ours, theirs) < 1e-12


def total(ring: Ring, mine: Tensor) -> Tensor:
    """Summed over the ring."""
    return mine if ring.size == 1 else torch.stack(share(ring, mine.reshape(-1), "grads")).sum(0).view_as(mine)


def trained(ring: Ring, steps: int) -> list[float]:
    """Losses of a layer that is to say the token three before, learned over the ring."""
    torch.manual_seed(0)
    embed, head, mixture = nn.Embedding(12, 16), nn.Linear(16, 12), synthesizer.Mixture(synthesizer.Random(1, 24))
    modules = nn.ModuleList([embed, head, mixture])
    optimizer, layout, losses = torch.optim.Adam(modules.parameters(), 0.05), Layout.zigzag(24, ring.size), list[float]()
    for _ in range(steps):
        tokens = torch.randint(12, (8, 24))
        mine = layout.indices(ring.rank)
        x = embed(tokens[:, mine])[:, :, None]
        out = head(mixture(x, x, x, ring=ring, layout=layout)[:, :, 0])
        seen = mine >= 3
        loss = cross_entropy(out[:, seen].flatten(0, 1), tokens[:, mine[seen] - 3].flatten(), reduction="sum") / (8 * 21)
        optimizer.zero_grad()
        loss.backward()
        for p in modules.parameters():
            assert p.grad is not None
            p.grad = total(ring, p.grad)
        optimizer.step()
        losses.append(float(total(ring, loss.detach())))
    return losses


def test_a_mixture_learns_over_a_ring_as_on_one_process(pool: Pool) -> None:
    for losses in pool.run(trained, 60, size=2):
        assert losses == pytest.approx(trained(Ring.alone(), 60), rel=1e-3)
        assert losses[0] > 2.3 and losses[-1] < 0.5
