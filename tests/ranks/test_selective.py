"""Selective Attention on real ranks: the operator, a wrapped model read in chunks, its gradients, and torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.huggingface import wrap
from ringctx.methods.selective import Selective
from ringctx.patterns import causal, window
from ringctx.runtime.cache import KVCache
from ringctx.runtime.snapshot import Snapshot
from ringctx.testing import dense, errors
from tests.pool import Pool
from tests.unit.test_branches_model import by_definition
from tests.unit.test_huggingface import IDS, POSITIONS, tiny
from tests.unit.test_selective import NAMES, on_a_rank, whole_tensors

CHUNKS = ((0, 23), (23, 17))
ATTENTION = Attention(carry=Selective())
CPU = torch.device("cpu")


def shares(ring: Ring, layout: Layout, attention: Attention, whole: list[Tensor]) -> list[Tensor]:
    return on_a_rank(ring, layout, attention, whole, "auto")[0]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("pattern", [causal(), causal() & window(30)], ids=str)
def test_ranks_compute_what_the_oracle_does(pool: Pool, size: int, kind: str, pattern: Any) -> None:
    layout, attention = getattr(Layout, kind)(101, size), Attention(pattern=pattern, carry=Selective())
    whole = whole_tensors(101, (4, 2), torch.float64)
    q, k, v, dout, dlse, dmemory = whole
    parts = pool.run(shares, layout, attention, whole, size=size)
    got = {name: layout.unshard([part[n] for part in parts]) for n, name in enumerate(NAMES)}
    wanted = dense(attention, q, k, v, dout=dout, dlse=dlse, dmemory=dmemory)
    assert max(errors(wanted, dout=dout, **got).values()) < 1e-12


@torch.no_grad()
def said(ring: Ring, kind: str, folder: str | None = None) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """This rank's indices and logits of each chunk, and the logits of ten tokens that are decoded; saved in the folder between."""
    model: Any = tiny()
    context, cache, parts = wrap(model, ring, ATTENTION), KVCache(4, ring.rank, ring.size, page=2), []
    for begin, length in CHUNKS:
        layout = getattr(Layout, kind)(length, ring.size).shifted(begin)
        indices = layout.indices(ring.rank)
        cache.extend(layout)
        with context.running(layout, cache):
            parts.append((indices, model(IDS[:1, indices], position_ids=indices[None], use_cache=False).logits[0]))
    if folder:
        Snapshot.new(Path(folder), {"cache.storage": "model"}, ring, CPU).save(cache)
    return parts, decoded(model, context, cache)


def decoded(model: Any, context: Any, cache: KVCache) -> Tensor:
    new = []
    for n in range(40, 50):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            new.append(model(IDS[:1, n : n + 1], position_ids=POSITIONS[:, n : n + 1], use_cache=False).logits[0])
    return torch.cat(new)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_chunks_and_decode_over_ranks_say_what_the_definition_says(pool: Pool, kind: str, size: int) -> None:
    want = by_definition(tiny(), ATTENTION)[0]
    everyone = pool.run(said, kind, size=size)
    got = torch.empty_like(want)
    for parts, new in everyone:
        for indices, part in parts:
            got[indices] = part
        got[40:] = new
        assert torch.equal(new, everyone[0][1])
    assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)


@torch.no_grad()
def resumed(ring: Ring, folder: str) -> Tensor:
    model: Any = tiny()
    context, cache = wrap(model, ring, ATTENTION), KVCache(4, ring.rank, ring.size, page=2)
    layouts = [Layout.zigzag(length, ring.size).shifted(begin) for begin, length in CHUNKS]
    Snapshot.open(Path(folder), {"cache.storage": "model"}, ring, CPU).load(cache, layouts)
    return decoded(model, context, cache)


def test_what_three_ranks_saved_two_go_on_with(pool: Pool, tmp_path: Path) -> None:
    want = pool.run(said, "contiguous", str(tmp_path), size=3)[0][1]
    for got in pool.run(resumed, str(tmp_path), size=2):
        assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)


def gradients(ring: Ring, kind: str) -> list[Tensor]:
    """Of the model's weights, of logits and memory, summed over this rank's tokens."""
    model: Any = tiny().double()
    context = wrap(model, ring, ATTENTION)
    layout = getattr(Layout, kind)(41, ring.size)
    indices = layout.indices(ring.rank)
    with context.running(layout):
        logits = model(IDS[:, indices], position_ids=indices[None], use_cache=False).logits
    (logits.square().sum() + sum(m.sum() for m in context.memories.values())).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_gradients_of_all_ranks_add_up_to_those_of_one(pool: Pool, kind: str) -> None:
    want = gradients(Ring.alone(), kind)
    for size in (2, 3):
        totals = [sum(grads) for grads in zip(*pool.run(gradients, kind, size=size), strict=True)]
        assert all(float((total - one).norm() / one.norm()) < 1e-10 for total, one in zip(totals, want, strict=True))


def compiled(ring: Ring, kind: str) -> None:
    layout = getattr(Layout, kind)(37, ring.size)
    whole = whole_tensors(37, (4, 2), torch.float64)
    mine = [layout.shard(x, ring.rank).requires_grad_() for x in whole[:3]]
    dout = layout.shard(whole[3], ring.rank)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ring_attention(q * 1.0, k, v, ring=ring, layout=layout, attention=ATTENTION) * 2.0

    want = torch.autograd.grad(step(*mine), mine, dout)
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got in (
        torch.autograd.grad(fast(*mine), mine, dout),
        torch.autograd.grad(checkpoint(step, *mine, use_reentrant=False), mine, dout),
    ):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_compile_makes_one_graph_of_it_and_checkpoints_recompute_it(pool: Pool, kind: str) -> None:
    pool.run(compiled, kind, size=2)
