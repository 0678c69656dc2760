"""MoBA trains: gradients flow through the blocks that were chosen, as if these had been a mask, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.core.select import sight_of
from ringctx.errors import Unsupported
from ringctx.methods.rotary import Rotary
from ringctx.methods.selectors import Moba, XAttention
from ringctx.patterns import causal
from ringctx.testing import dense, error, golden_inputs
from tests.pool import Pool

S, H, G, D = 61, 4, 2, 8
MOBA = Attention(encoding=Rotary((1.0, 0.3, 0.05, 0.004)), select=Moba(blocks=3, block=8))


def trained(ring: Ring, kind: str) -> list[Tensor]:
    """This rank's out, dq, dk, dv."""
    layout = getattr(Layout, kind)(S, ring.size)
    q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_(n < 3) for n, x in enumerate(golden_inputs(1, H, S, D, G)))
    run = lambda: ring_attention(4 * q, k, v, ring=ring, layout=layout, attention=MOBA)
    out, again = run(), run()  # what was planned for the first is gone by the time of its backward
    assert isinstance(out, Tensor) and isinstance(again, Tensor) and torch.equal(out, again)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def by_mask() -> list[Tensor]:
    q, k, v, dout = golden_inputs(1, H, S, D, G)
    at, ring, layout = torch.arange(S), Ring.alone(), Layout.contiguous(S, 1)
    q = 4 * q
    assert MOBA.encoding is not None
    turned = MOBA.encoding.queries(q, at)[0], MOBA.encoding.keys(k, at)[0]
    chosen = MOBA.select.select(*turned, sight_of(ring, layout, layout, MOBA, D))
    assert 0.2 < float((causal() & chosen).allows(at, at).double().mean()) < 0.45  # of all pairs, half of which lie ahead
    found = dense(Attention(causal() & chosen, encoding=MOBA.encoding), q, k, v, dout=dout)
    assert found.dq is not None and found.dk is not None and found.dv is not None
    return [found.out, 4 * found.dq, found.dk, found.dv]


@pytest.mark.parametrize(("size", "kind"), [(1, "contiguous"), (2, "zigzag"), (3, "contiguous"), (4, "striped")])
def test_gradients_are_those_of_a_mask(pool: Pool, size: int, kind: str) -> None:
    parts = pool.run(trained, kind, size=size) if size > 1 else [trained(Ring.alone(), kind)]
    layout = getattr(Layout, kind)(S, size)
    for n, want in enumerate(by_mask()):
        assert error(layout.unshard([part[n] for part in parts]), want) < 1e-12


def test_others_are_for_inference() -> None:
    q, k, v, _ = golden_inputs(1, H, S, D, G)
    with pytest.raises(Unsupported, match="XAttention selects for inference"):
        ring_attention(
            q.requires_grad_(), k, v, ring=Ring.alone(), layout=Layout.contiguous(S, 1), attention=Attention(select=XAttention(0.9, 4, 8))
        )
