"""One row of the benchmark: what is attended to, by whom it is timed, and torch's own attention beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.carry import Carry
from ringctx.core.ring import Ring

Times = tuple[float, float]
"""Seconds forward and backward."""


@dataclass(frozen=True)
class Case:
    """One row of the table: zigzag, causal, one sequence."""

    S: int
    dtype: torch.dtype
    transport: str
    h: int = 8
    g: int = 8
    d: int = 64
    kernel: str = "auto"
    carry: Carry | None = None

    @property
    def attention(self) -> Attention:
        """Causal, with the carry."""
        return Attention(carry=self.carry)

    def __str__(self) -> str:
        carry = f", {self.carry} against none" if self.carry else ""
        return f"{self.transport}{'' if self.kernel == 'auto' else ' ' + self.kernel}, {self.h}:{self.g} heads, d {self.d}{carry}"


def tensors_of(case: Case) -> list[Tensor]:
    """q, k, v and dout, whole; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.h, case.g, case.g, case.h)
    return [torch.randn(1, case.S, n, case.d, generator=generator).to(case.dtype) for n in heads]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, causal."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True).transpose(1, 2)


def timed(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Times:
    """Once, forward and backward. tensors: q, k, v, dout."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    finish(q.device)
    began = time.perf_counter()
    out = attend(*leaves)
    finish(q.device)
    middle = time.perf_counter()
    out.backward(dout)
    finish(q.device)
    return middle - began, time.perf_counter() - middle


def meet(ring: Ring, device: torch.device) -> None:
    """Wait for all ranks, and for what their GPUs were given to do."""
    finish(device)
    if ring.group is not None:
        dist.barrier(ring.group)


def finish(device: torch.device) -> None:
    """Wait for what this rank's GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(ring: Ring, times: Sequence[tuple[float, ...]], device: torch.device) -> list[Any]:
    """Each round as long as its slowest rank took."""
    found = torch.tensor(times, dtype=torch.float64, device=device)
    if ring.group is not None:
        dist.all_reduce(found, dist.ReduceOp.MAX, ring.group)
    return [tuple(row) for row in found.tolist()]
