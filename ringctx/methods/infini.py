"""Infini-attention: attention inside a segment beside a memory of all segments before it, weighed by a gate a head.

    A_mem = f(Q) M / (f(Q) z)          read before the segment's own keys are put in; f(x) = ELU(x) + 1; 0 where the memory is empty
    linear:  M += f(K)^T V             delta:  M += f(K)^T (V - f(K) M / (f(K) z))             z += sum f(K)
    out = sigmoid(gate) A_mem + (1 - sigmoid(gate)) A_segment

Source: Munkhdalai et al. 2024 (Infini-attention, arXiv 2404.07143), equations 3 to 10. The memory sees queries and keys unencoded.
A rank holds whole segments, in order. Linear: each rank sends its own sum of states to all, which is all that a scan needs. Delta: a state
depends on the one before, so rank r waits for rank r - 1. Of keys what a segment needs travels: nothing.
Letters: b batch, s tokens here, h query heads, g key heads, d key width, e value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu

from ringctx.core.attention import Attention, Encoding
from ringctx.core.decode import decode_attention
from ringctx.core.entry import ring_attention
from ringctx.core.gathered import gathered
from ringctx.core.layout import Layout
from ringctx.core.ring import Message, Ring
from ringctx.core.rules import at_least
from ringctx.errors import LayoutError
from ringctx.kernels.base import accumulation_dtype
from ringctx.methods.sighted import sight_at
from ringctx.patterns import causal, own_block

KIND = "memory"
"""How the traffic counters call states."""


@dataclass(frozen=True)
class Memory:
    """matrix (b g d e) and total (b g d), of all whole segments so far; fp32, or fp64 of fp64. Equal on every rank."""

    matrix: Tensor
    total: Tensor

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> Memory:
        """For keys (b n g d) and values (b n g e)."""
        b, _, g, d = k.shape
        zeros = k.new_zeros(b, g, d, v.shape[3] + 1, dtype=accumulation_dtype(k.dtype))
        return cls(zeros[..., :-1], zeros[..., -1])

    def read(self, x: Tensor) -> Tensor:
        """Queries (b s h d), not encoded -> (b s h e) in the memory's dtype."""
        g = self.total.shape[1]
        by_group = _positive(x, self).unflatten(2, (g, x.shape[2] // g))
        found = torch.einsum("bsgrd,bgde->bsgre", by_group, self.matrix)
        weight = torch.einsum("bsgrd,bgd->bsgr", by_group, self.total)[..., None]
        return torch.where(weight > 0, found / weight.where(weight > 0, torch.ones_like(weight)), 0.0).flatten(2, 3)

    def added(self, k: Tensor, v: Tensor, delta: bool) -> Memory:
        """With one more segment of keys (b n g d), not encoded, and values (b n g e)."""
        new, values = _positive(k, self), v.to(self.matrix.dtype)
        if delta:
            values = values - self.read(k)
        return Memory(self.matrix + torch.einsum("bngd,bnge->bgde", new, values), self.total + new.sum(1))

    def packed(self) -> Tensor:
        """As one tensor (b g d e + 1)."""
        return torch.cat([self.matrix, self.total[..., None]], -1)

    @classmethod
    def unpacked(cls, x: Tensor) -> Memory:
        """What `packed` gave."""
        return cls(x[..., :-1], x[..., -1])


@dataclass(frozen=True)
class Infini:
    """segment: tokens of one. delta: the delta rule instead of the linear one. Raises ConfigError for a segment below 1."""

    segment: int = 2048
    delta: bool = False

    def __post_init__(self) -> None:
        at_least(1, "Infini", self.segment, "it counts the tokens of a segment")

    def layout(self, length: int, size: int) -> Layout:
        """A layout that gives ranks whole segments, in order."""
        return Layout.contiguous(length, size, block=self.segment)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        *,
        ring: Ring,
        layout: Layout,
        encoding: Encoding | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Memory]:
        """q (b s h d), k (b s g d), v (b s g e), gate (h) -> out (b s h e), and the memory of all whole segments. All ranks together.

        encoding: of queries and keys by index, inside segments. memory: of the tokens before this layout's, None for none; a later part of
        a sequence begins where whole segments end. Differentiable; the gradient of the gate is this rank's share.
        Raises LayoutError where a rank holds parts of segments, or out of order.
        """
        sight_at(self, q, k, v, ring=ring, layout=layout)
        self._check(layout)
        near = ring_attention(q, k, v, ring=ring, layout=layout, attention=self._near(encoding))
        assert isinstance(near, Tensor)
        state = Memory.empty(k, v) if memory is None else memory
        if self.delta:
            far, after = self._in_turn(q, k, v, state, ring)
        else:
            far, after = self._at_once(q, k, v, state, ring)
        return _mixed(gate, far, near), after

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        *,
        ring: Ring,
        key_layout: Layout,
        memory: Memory,
        encoding: Encoding | None = None,
    ) -> Tensor:
        """The newest tokens, all in one segment, equal on every rank: q (b n h d) -> (b n h e). All ranks together, without backward.

        k (b n g d), v (b n g e): this rank's share of key_layout, of which the current segment's are seen. memory: of those before it.
        """
        near = decode_attention(q, k, v, key_layout=key_layout, ring=ring, attention=self._near(encoding))
        return _mixed(gate, memory.read(q), near)

    def _near(self, encoding: Encoding | None) -> Attention:
        return Attention(pattern=causal() & own_block(self.segment), encoding=encoding)

    def _check(self, layout: Layout) -> None:
        owned = [ranges for ranges in layout.spans if ranges]
        edges = [(ranges[0].start, ranges[-1].stop) for ranges in owned]
        in_order = all(len(ranges) == 1 and ranges[0].step == 1 for ranges in owned)
        joined = all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
        if not (in_order and joined and all(start % self.segment == 0 for start, _ in edges)):
            raise LayoutError(
                f"Infini-attention reads segments of {self.segment} tokens in order, and the layout ({layout}) gives ranks parts of them; "
                f"make it by Infini({self.segment}).layout(length, ranks), and begin later parts where whole segments end."
            )

    def _at_once(self, q: Tensor, k: Tensor, v: Tensor, state: Memory, ring: Ring) -> tuple[Tensor, Memory]:
        """Linear: each rank's own sum goes to all ranks, which add those before them."""
        here = [_joined(Memory.empty(k, v), k, v)]  # the memory of this rank's own tokens before each of its segments, and after all
        for _, k_, v_ in self._whole(q, k, v):
            here.append(here[-1].added(k_, v_, False))
        sums = gathered(ring, here[-1].packed()[None], KIND, [1] * ring.size)
        before = state.packed() + sums[: ring.rank].sum(0)
        segments = [*(q_ for (q_,) in self._whole(q)), q[:, (len(here) - 1) * self.segment :]]
        far = [Memory.unpacked(before + own.packed()).read(q_) for own, q_ in zip(here, segments, strict=True)]
        return torch.cat(far, 1), Memory.unpacked(state.packed() + sums.sum(0))

    def _in_turn(self, q: Tensor, k: Tensor, v: Tensor, state: Memory, ring: Ring) -> tuple[Tensor, Memory]:
        """Delta: the state goes from rank to rank."""
        if ring.rank:
            state = Memory.unpacked(_receive(ring, state.packed()))
        far, state = self._read(q, k, v, _joined(state, k, v))
        if ring.rank + 1 < ring.size:
            far = far + _send(ring, state.packed())
        last = state.packed()[None][: ring.rank + 1 == ring.size]
        return far, Memory.unpacked(gathered(ring, last, KIND, [0] * (ring.size - 1) + [1])[0])

    def _read(self, q: Tensor, k: Tensor, v: Tensor, state: Memory) -> tuple[Tensor, Memory]:
        """By the delta rule: what these tokens read (b s h e), and the memory with their whole segments."""
        found = []
        for q_, k_, v_ in self._whole(q, k, v):
            found.append(state.read(q_))
            state = state.added(k_, v_, True)
        rest = q[:, len(found) * self.segment :]
        return torch.cat([*found, state.read(rest)], 1), state

    def _whole(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The whole segments here; the last one of the sequence may be none."""
        for at in range(0, tensors[0].shape[1] // self.segment * self.segment, self.segment):
            yield tuple(x[:, at : at + self.segment] for x in tensors)


def _joined(memory: Memory, k: Tensor, v: Tensor) -> Memory:
    """The same memory, made of these keys for autograd, so that a rank without a whole segment takes part in backward."""
    return memory.added(k[:, :0], v[:, :0], False)


def _positive(x: Tensor, memory: Memory) -> Tensor:
    return elu(x.to(memory.matrix.dtype)) + 1


def _mixed(gate: Tensor, far: Tensor, near: Tensor) -> Tensor:
    weight = gate.sigmoid()[:, None].to(far.dtype)
    return (weight * far + (1 - weight) * near.to(far.dtype)).to(near.dtype)


# -- a state that goes from rank to rank, and its gradient back --------------------------------------------------------------


def _send(ring: Ring, x: Tensor) -> Tensor:
    """Send x to the next rank. The 0 that is returned must be added to what backward begins from, so that x's gradient is waited for."""
    zero: Tensor = _Send.apply(x, ring)
    return zero


def _receive(ring: Ring, like: Tensor) -> Tensor:
    """What the rank before sent, of this shape."""
    found: Tensor = _Receive.apply(torch.zeros_like(like).requires_grad_(torch.is_grad_enabled()), ring)
    return found


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring, ctx.like = ring, x
        ring.exchange(KIND, "a memory", (), [Message(ring.rank + 1, (x.contiguous(),))]).wait()
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        found = torch.empty_like(ctx.like, memory_format=torch.contiguous_format)
        ctx.ring.exchange(KIND, "a memory's gradient", [Message(ctx.ring.rank + 1, (found,))], grads=True).wait()
        return found, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, like: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        ring.exchange(KIND, "a memory", [Message(ring.rank - 1, (found,))]).wait()
        return found

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.ring.exchange(KIND, "a memory's gradient", (), [Message(ctx.ring.rank - 1, (dx.contiguous(),))], grads=True).wait()
        return dx, None
