"""Plans: of every attention that a model's layers have, who sees whom, who computes it, and what travels for it.

Knows configurations and plans; of a model its shapes alone. Sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from ringctx.config import Config
from ringctx.core.attention import Attention
from ringctx.core.choose import Choice, Shape, choose
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern, Verdict
from ringctx.core.plan import Plan, make_plan
from ringctx.device import device_of, dtype_of
from ringctx.kernels.base import accumulation_dtype
from ringctx.tools.shapes import Shapes, by_layer, shapes_of

CELLS = 128
"""Most cells of a drawn mask, each way."""


@dataclass(frozen=True)
class Shown:
    """layers: such as '0 to 28'. patterns: of each head group and branch. plans: of each rank, of rotate where not keys travel.

    bytes_a_token: of its key and value.
    """

    layers: str
    attention: Attention
    patterns: tuple[Pattern, ...]
    layout: Layout
    choice: Choice
    plans: tuple[Plan, ...]
    bytes_a_token: int

    def cells(self, pattern: Pattern) -> list[list[Verdict]]:
        """The mask, coarsely: what is judged of each square of indices."""
        spans = self.squares
        return [[pattern.judge(q, k) for k in spans] for q in spans]

    @property
    def squares(self) -> list[range]:
        """The runs of indices that a cell stands for."""
        length = sum(self.layout.count(rank) for rank in range(self.layout.size))
        count = min(CELLS, length)
        return [range(n * length // count, (n + 1) * length // count) for n in range(count)]


def shown(config: Config, tokens: int, ranks: int) -> list[Shown]:
    """What prefill of so many tokens asks of so many ranks, for each attention of the model's layers.

    Raises ConfigError for what cannot be planned before anything is read, as selectors and carries.
    """
    shapes = shapes_of(config)
    layers, layout = by_layer(config, shapes), getattr(Layout, config.layout.kind)(tokens, ranks)
    different = dict.fromkeys(layers.values())
    return [_shown(config, shapes, one, [n for n, other in layers.items() if other == one], layout) for one in different]


def _shown(config: Config, shapes: Shapes, attention: Attention, layers: list[int], layout: Layout) -> Shown:
    patterns = tuple(pattern for _, seen in attention.parts(shapes.heads) for pattern, _ in seen)
    dtype = _dtype(config)
    sizes = dtype.itemsize, accumulation_dtype(dtype).itemsize
    shape = Shape(1, shapes.heads, shapes.key_heads, shapes.width, shapes.width, *sizes, backward=False)
    choice = choose(patterns, layout, layout, shape)
    moving = choice.transport if choice.transport in ("rotate", "fetch", "gather") else "rotate"
    plans = tuple(make_plan(patterns, layout, layout, rank, moving) for rank in range(layout.size))
    return Shown(_runs(layers), attention, patterns, layout, choice, plans, shapes.values_a_token * dtype.itemsize)


def _dtype(config: Config) -> torch.dtype:
    return dtype_of(config.model, device_of(config.model))


def _runs(layers: list[int]) -> str:
    """Layers 0 to 2 and 5 as '0 to 2, 5'."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
