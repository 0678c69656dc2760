"""Attention over 8,192 tokens with a window and sinks, every rank holding its share; alone, or under torchrun."""

import torch

from ringctx import Attention, Layout, Ring, ring_attention
from ringctx.patterns import causal, sinks, window

with Ring.from_env() as ring:  # torchrun's ranks, or a ring of one
    device = f"cuda:{ring.rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    layout = Layout.zigzag(8_192, ring.size)
    attention = Attention(pattern=causal() & (window(1_024) | sinks(4)))
    torch.manual_seed(0)  # the same whole tensors everywhere; each rank keeps its shard
    whole = torch.randn(3, 1, 8_192, 8, 64)  # (b, S, h, d) of q, k and v
    q, k, v = (layout.shard(x, ring.rank).to(device).requires_grad_() for x in whole)
    out = ring_attention(q, k, v, ring=ring, layout=layout, attention=attention)  # (b, s, h, d)
    out.square().sum().backward()
    print(f"rank {ring.rank}: out {tuple(out.shape)}, |dk|² {k.grad.square().sum():.6f}")
    print(ring.traffic)  # bytes and messages sent and received, by kind
