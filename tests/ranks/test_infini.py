"""Infini-attention: segments beside a memory of those before, on one rank and on many, backward, in parts and token by token."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import elu

from ringctx import Layout, LayoutError, Ring
from ringctx.methods.infini import Infini, Memory
from ringctx.methods.rotary import Rotary
from ringctx.testing import error, golden_inputs
from tests.methods.contract import slope
from tests.methods.whole import softmax_attention
from tests.pool import Pool

S, SEGMENT, H, G, D = 45, 8, 4, 2, 8
ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))
GATE = torch.tensor([0.3, -0.5, 1.2, 0.0], dtype=torch.float64)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return golden_inputs(2, H, S, D, G)[:3]


def definition(delta: bool, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The paper's recurrence, a segment at a time, on whole tensors."""
    f, at = (lambda x: elu(x) + 1), torch.arange(S)
    q_, k_ = ROTARY.queries(q, at), ROTARY.keys(k, at)
    near = softmax_attention(q_, k_, v, (at <= at[:, None]) & (at // SEGMENT == (at // SEGMENT)[:, None]))
    far = []
    for head in range(H):
        matrix, total = torch.zeros(2, D, D, dtype=q.dtype), torch.zeros(2, D, dtype=q.dtype)
        rows = []
        for first in range(0, S, SEGMENT):
            here = slice(first, first + SEGMENT)
            query, key, value = f(q[:, here, head]), f(k[:, here, head * G // H]), v[:, here, head * G // H]
            read = lambda x: x @ matrix / (x @ total[..., None]) if first else 0 * x @ matrix  # noqa: B023
            rows.append(read(query))
            matrix, total = matrix + key.mT @ (value - (read(key) if delta else 0)), total + key.sum(1)
        far.append(torch.cat(rows, 1))
    weight = gate.sigmoid()[:, None]
    return weight * torch.stack(far, 2) + (1 - weight) * near


@cache
def reference(delta: bool) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in (*inputs(), GATE)]
    out = definition(delta, *leaves)
    out.backward(slope(out.detach()))
    return out.detach(), [x.grad for x in leaves if x.grad is not None]


def trained(ring: Ring, delta: bool) -> tuple[Tensor, list[Tensor], Memory, dict[str, int]]:
    """This rank's out, the gradients of q, k, v and its share of the gate's, the memory after, and what it sent forward."""
    how = Infini(SEGMENT, delta)
    layout = how.layout(S, ring.size)
    q, k, v = (layout.shard(x, ring.rank).requires_grad_() for x in inputs())
    gate = GATE.clone().requires_grad_()
    ring.traffic.reset()
    out, memory = how.attend(q, k, v, gate, ring=ring, layout=layout, encoding=ROTARY)
    sent = dict(ring.traffic.sent)
    out.backward(slope(torch.empty(2, S, H, D, dtype=torch.float64))[:, layout.indices(ring.rank)])
    return (
        out.detach(),
        [x.grad for x in (q, k, v, gate) if x.grad is not None],
        Memory(memory.matrix.detach(), memory.total.detach()),
        sent,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("delta", [False, True])
def test_it_is_the_recurrence_forward_and_backward(pool: Pool, delta: bool, size: int) -> None:
    parts = pool.run(trained, delta, size=size) if size > 1 else [trained(Ring.alone(), delta)]
    layout, (out, slopes) = Infini(SEGMENT, delta).layout(S, size), reference(delta)
    assert error(layout.unshard([part[0] for part in parts]), out) < 1e-12
    for n, want in enumerate(slopes[:3]):
        assert error(layout.unshard([part[1][n] for part in parts]), want) < 1e-10
    assert error(torch.stack([part[1][3] for part in parts]).sum(0), slopes[3]) < 1e-10
    for _, _, memory, sent in parts:
        assert torch.equal(memory.matrix, parts[0][2].matrix) and not sent.get("keys")  # no key leaves its rank
    if size == 2:  # linear: one state to the other; delta: the first rank's, and the last one's at the end
        state = 2 * G * D * (D + 1) * 8
        assert [part[3]["memory"] for part in parts] == [state, state]


def test_the_golden_memories() -> None:
    q, k, v, _ = golden_inputs()
    gate = torch.full((2,), 60.0, dtype=torch.float64)  # the memory alone
    for delta, row, norm in (
        (False, [0.153304, 0.221054, 0.003556, -0.206021], 161.740926),
        (True, [0.113135, 0.151260, 0.033337, -0.155209], 142.921765),
    ):
        how = Infini(16, delta)
        out, memory = how.attend(q, k, v, gate, ring=Ring.alone(), layout=how.layout(64, 1))
        assert out[0, 63, 0, :4].tolist() == pytest.approx(row, abs=1e-6)
        assert float(memory.matrix[0, 0].norm()) == pytest.approx(norm, abs=1e-6)
        assert float(memory.total[0, 0, 0]) == pytest.approx(72.529236, abs=1e-6)


def in_parts(ring: Ring, delta: bool) -> list[Tensor]:
    """Rows of two parts of whole segments, and of tokens decoded after them, each over the memory of whole segments."""
    how, (q, k, v), found = Infini(SEGMENT, delta), inputs(), []
    memory, keys = None, Layout(((),) * ring.size)
    with torch.no_grad():
        for first, last in ((0, 24), (24, 40)):
            layout = how.layout(last - first, ring.size).shifted(first)
            at = layout.indices(ring.rank)
            out, memory = how.attend(q[:, at], k[:, at], v[:, at], GATE, ring=ring, layout=layout, encoding=ROTARY, memory=memory)
            found.append(out)
        for n in range(40, S):
            keys = Layout(tuple((*spans, range(n, n + 1)) if r == n % ring.size else spans for r, spans in enumerate(keys.spans)))
            at = keys.indices(ring.rank)
            assert memory is not None
            found.append(how.decode(q[:, n : n + 1], k[:, at], v[:, at], GATE, ring=ring, key_layout=keys, memory=memory, encoding=ROTARY))
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("delta", [False, True])
def test_parts_and_single_tokens_say_what_the_whole_says(pool: Pool, delta: bool, size: int) -> None:
    parts, (out, _) = (pool.run(in_parts, delta, size=size) if size > 1 else [in_parts(Ring.alone(), delta)]), reference(delta)
    how = Infini(SEGMENT, delta)
    for n, (first, last) in enumerate(((0, 24), (24, 40))):
        assert error(how.layout(last - first, size).unshard([part[n] for part in parts]), out[:, first:last]) < 1e-12
    for part in parts:
        assert error(torch.cat(part[2:], 1), out[:, 40:]) < 1e-12


def refusal(ring: Ring, kind: str) -> str:
    layout = getattr(Layout, kind)(S, ring.size)
    q, k, v = (layout.shard(x, ring.rank) for x in inputs())
    with pytest.raises(LayoutError) as refused:
        Infini(SEGMENT).attend(q, k, v, GATE, ring=ring, layout=layout)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_ranks_that_hold_parts_of_segments_are_refused(pool: Pool, kind: str) -> None:
    assert all("Infini(8).layout(length, ranks)" in said for said in pool.run(refusal, kind, size=2))
