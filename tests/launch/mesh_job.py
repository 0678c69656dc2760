"""Run by torchrun on 4 ranks: rings made of a DeviceMesh answer like the dense oracle, whichever axes are named."""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh

from ringctx import Attention, ConfigError, Layout, Ring, ring_attention
from ringctx.patterns import causal, window
from ringctx.testing import dense, error

S = 41
ATTENTION = Attention(causal() & window(17))


def check(ring: Ring, size: int) -> None:
    """The ring has this many ranks, and out and dk on this rank are right."""
    assert ring.size == size, (ring.size, size)
    layout = Layout.zigzag(S, ring.size)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, S, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2, 4)]
    q, k, v, dout = (layout.shard(x, ring.rank).requires_grad_() for x in whole)
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=ATTENTION)
    out.backward(dout.detach())
    truth = dense(ATTENTION, *whole[:3], dout=whole[3])
    assert error(out, layout.shard(truth.out, ring.rank)) < 1e-12
    assert error(k.grad, layout.shard(truth.dk, ring.rank)) < 1e-12


def main() -> None:
    """Every way of folding four ranks, and a mesh whose other axis is data parallel."""
    torch.set_num_threads(1)
    with Ring.from_env(timeout=30) as ring:
        check(ring, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ring"))
        check(Ring.from_mesh(mesh, timeout=30), 2)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "heads"))
        folded = Ring.from_mesh(mesh, heads="heads", timeout=30)
        assert (folded.heads, folded.nodes) == (2, 1)
        check(folded, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "ring"))
        folded = Ring.from_mesh(mesh, node="node", timeout=30)
        assert (folded.heads, folded.nodes) == (1, 2)
        check(folded, 4)
        try:
            Ring.from_mesh(mesh, "circle")
        except ConfigError as refusal:
            assert "none called 'circle'" in str(refusal)
        else:
            sys.exit("an unknown axis was taken")


if __name__ == "__main__":
    main()
