"""Small values between ranks: one rank's tensor to all, and every rank's facts to all. Every wait has the ring's deadline."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ringctx.core.ring import Message, Ring

KIND = "control"
"""What the traffic counters call these bytes."""


def broadcast(ring: Ring, tensor: Tensor, root: int, what: str) -> Tensor:
    """The root's tensor on every rank; the others pass one of the same shape and dtype, which is overwritten."""
    others = [rank for rank in range(ring.size) if rank != root]
    if ring.rank == root:
        ring.exchange(KIND, what, send=[Message(rank, (tensor,)) for rank in others]).wait()
    else:
        ring.exchange(KIND, what, receive=[Message(root, (tensor,))]).wait()
    return tensor


def tell(ring: Ring, value: Any, device: torch.device, what: str) -> Any:
    """Rank 0's value (anything JSON can hold) on every rank; what the others pass is ignored."""
    text = json.dumps(value).encode() if ring.rank == 0 else b""
    size = int(broadcast(ring, torch.tensor([len(text)], device=device), 0, what))
    data = torch.frombuffer(bytearray(text or size), dtype=torch.uint8).to(device)
    return json.loads(bytes(broadcast(ring, data, 0, what).cpu().numpy()))


def share(ring: Ring, value: Any, device: torch.device, what: str) -> list[Any]:
    """Every rank's value (anything JSON can hold), in rank order, on every rank."""
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = _all(ring, torch.tensor([len(text)], device=device), [1] * ring.size, what)
    texts = _all(ring, text, [int(size) for size in sizes], what)
    return [json.loads(bytes(t.tolist())) for t in texts]


def _all(ring: Ring, mine: Tensor, sizes: list[int], what: str) -> list[Tensor]:
    """Every rank's 1-d tensor, whose lengths are known."""
    parts = [mine if rank == ring.rank else mine.new_empty(size) for rank, size in enumerate(sizes)]
    others = [rank for rank in range(ring.size) if rank != ring.rank]
    receive, send = [Message(rank, (parts[rank],)) for rank in others], [Message(rank, (mine,)) for rank in others]
    ring.exchange(KIND, what, receive, send).wait()
    return parts
