"""Rotary: pairs of dims turned by an angle that grows with the position.

Knows positions and frequencies. Knows nothing of models, caches or ranks.
Letters: b batch, s tokens, h heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT = 4
"""Tables that a Rotary keeps: the keys of one layer come in about so many visits."""


@dataclass(frozen=True)
class Rotary:
    """Rotate dims (p, p + w/2) of the first w by `position * frequencies[p]`; leave the others alone. w = 2 * len(frequencies).

    interleaved: rotate dims (2p, 2p + 1) instead, as RoFormer's paper has it and GPT-J's code.

    Law: the product of a query and a key depends on the difference of their positions alone.
    frequencies: radians a position; float32 values, as Hugging Face's `inv_freq`, so that fp32 results are the same bit for bit.
    scaling: what cos and sin are multiplied by (YaRN's attention factor).
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    interleaved: bool = False
    _memo: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def width(self) -> int:
        """How many dims are rotated."""
        return 2 * len(self.frequencies)

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """q (b s h d), positions (s,) or (b, s), whole or fractional  ->  (b s h d)."""
        return self.rotate(q, positions)

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """k (b s g d), positions (s,) or (b, s), whole or fractional  ->  (b s g d)."""
        return self.rotate(k, positions)

    def queries_grad(self, dq: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `queries`: turned back, and scaled as forward."""
        return self.rotate(dq, positions, back=True)

    def keys_grad(self, dk: Tensor, positions: Tensor) -> Tensor:
        """The transpose of `keys`."""
        return self.rotate(dk, positions, back=True)

    def rotate(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """x (b s h d) turned by its positions, or back; computed in float32 at least, returned in x's dtype."""
        cos, sin = self.tables(positions, torch.promote_types(x.dtype, torch.float32))
        sin = -sin if back else sin
        if not self.interleaved:
            return turn(x, cos, sin)
        pairs, rest = x[..., : self.width].unflatten(-1, (-1, 2)), x[..., self.width :]
        turned = turn(pairs.mT.flatten(-2), cos, sin).unflatten(-1, (2, -1)).mT.flatten(-2)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, ((b,) s 1 w/2). The last few are kept, because all layers ask for the same positions, visit by visit."""
        key = f"{positions.device} {dtype}"
        if not torch.compiler.is_compiling():
            for known, cos, sin in self._memo.get(key, ()):
                if _same(known, positions):
                    return cos, sin
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device).to(dtype)
        angles = positions[..., None].to(dtype) * frequencies
        angles = angles.unsqueeze(-2)
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        if not torch.compiler.is_compiling():
            self._memo[key] = [(positions, cos, sin), *self._memo.get(key, ())][:KEPT]
        return cos, sin


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b s h d) with its first w dims turned in pairs (p, p + w/2) by cos and sin ((b,) s 1 w/2), in their dtype; returned in x's."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    parts = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return torch.cat([*parts, rest] if rest.shape[-1] else parts, dim=-1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal positions; on a GPU only if they are one tensor, because comparing values would make it wait."""
    return a is b or (a.device.type == "cpu" and a.shape == b.shape and torch.equal(a, b))
