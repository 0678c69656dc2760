"""Memory, seen from outside: whatever the number of ranks, no more than two visiting blocks of keys are here at once.

Received tensors are followed by weak references to their memory from the moment their receive is posted, so a transport that
keeps its visitors is caught, however it does so. Keys are in bf16 and gradients in fp32, which tells them apart.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from ringctx import ring_attention
from tests.cases import Case, problem, small_steps
from tests.pool import Pool
from tests.wire import tapped


def _most(ring: Any, case: Case, steps: bool = False) -> dict[str, int]:
    """Most bytes of received keys and of received gradients that were here at once, forward and backward."""
    given = problem(case)
    q, k, v = (given.part(x, ring.rank, given.layout, given.i).requires_grad_() for x in (given.q, given.k, given.v))
    with tapped() as forward:
        out = ring_attention(q, k, v, ring=ring, layout=given.layout, attention=given.attention, transport=case.transport)
    with tapped() as backward, small_steps() if steps else nullcontext():
        torch.autograd.grad(out, (q, k, v), given.part(given.dout, ring.rank, given.layout, given.i))
    assert set(forward.most) <= {"bfloat16"}
    return {"forward": forward.most["bfloat16"], "backward": backward.most["bfloat16"], "grads": backward.most["float32"]}


@pytest.mark.parametrize("pattern", ["full", "causal", "causal&window300", "longformer"])
@pytest.mark.parametrize("route", ["rotate", "fetch", "double"])
@pytest.mark.parametrize(("size", "steps"), [(2, False), (4, False), (8, False), (2, True), (4, True)])
def test_two_visiting_blocks_at_most(pool: Pool, route: str, size: int, steps: bool, pattern: str) -> None:
    s = 48
    case = Case(size=size, length=s * size, layout="zigzag", pattern=pattern, route=route, dtype="bf16", heads=(4, 2), widths=(16, 32))
    block = s * 2 * (16 + 32) * 2
    for rank, most in enumerate(pool.run(_most, case, steps, size=size, fold=case.fold)):
        assert most["forward"] <= 2 * block, f"rank {rank} held {most['forward'] / block:.2f} blocks"
        assert most["backward"] <= 2 * block, f"rank {rank} held {most['backward'] / block:.2f} blocks in backward"
        assert most["grads"] <= 2 * (2 * block), f"rank {rank} held gradients of {most['grads'] / (2 * block):.2f} blocks"


def test_gather_holds_everything_and_is_seen_to(pool: Pool) -> None:
    """The measure works: gather's bound is the whole sequence, and that is what is seen."""
    case = Case(size=4, length=192, layout="zigzag", pattern="full", route="gather", dtype="bf16", heads=(4, 2), widths=(16, 32))
    assert all(most["forward"] == 3 * 48 * 2 * 48 * 2 for most in pool.run(_most, case, size=4))
