"""Hundreds of ranks without a process for each: torch's fake process group answers every send and receive at once.

What comes in is made up, so numbers mean nothing; that the call ends, and how many bytes it sent and received, is the ring's own code.
"""

from __future__ import annotations

import multiprocessing as mp
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.core.plan import make_plan
from ringctx.patterns import causal, sinks, window
from tests.pool import Fold

PATTERNS = {"causal": causal(), "window and sinks": causal() & (window(300) | sinks(4))}
HEADS, WIDTH, TOKENS = 2, 16, 32


def of_a_rank(size: int, rank: int, name: str, layout: str, transport: str, fold: Fold, answers: Any) -> None:
    """Forward and backward of one rank; puts what it sent and received beside what its plan says."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    ring = Ring.from_group(dist.group.WORLD, heads=fold.heads, nodes=fold.nodes, strict=False)
    shards = getattr(Layout, layout)(TOKENS * size, size)
    x = torch.ones(1, TOKENS, HEADS, WIDTH, requires_grad=True)
    out = ring_attention(x, x, x, ring=ring, layout=shards, attention=Attention(PATTERNS[name]), transport=transport)
    assert isinstance(out, torch.Tensor) and out.shape == x.shape
    out.sum().backward()
    plan = make_plan((PATTERNS[name],), shards, shards, rank, transport, fold.nodes)
    a_token = 2 * HEADS * WIDTH * 4
    told = [ring.traffic.received["keys"], ring.traffic.sent["keys"], ring.traffic.received["grads"], ring.traffic.sent["grads"]]
    planned = [2 * plan.tokens_received, 2 * plan.tokens_sent, plan.grad_tokens_received, plan.grad_tokens_sent]
    answers.put((told, [tokens * a_token for tokens in planned], len(plan.hops)))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("size", "layout", "transport", "fold"),
    [
        (8, "zigzag", "rotate", Fold()),
        (64, "zigzag", "fetch", Fold()),
        (64, "zigzag", "rotate", Fold(nodes=8)),
        (512, "contiguous", "fetch", Fold()),
        pytest.param(512, "zigzag", "rotate", Fold(), marks=pytest.mark.slow),
        pytest.param(512, "zigzag", "rotate", Fold(nodes=64), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_world_of_hundreds_sends_what_its_plan_says(size: int, layout: str, transport: str, fold: Fold, name: str) -> None:
    context = mp.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=of_a_rank, args=(size, size // 3, name, layout, transport, fold, answers))
    process.start()
    told, planned, hops = answers.get(timeout=200)
    process.join(20)
    assert process.exitcode == 0 and told == planned
    assert 0 < hops < size and (hops == size - 1 or layout == "contiguous" or name != "causal")
