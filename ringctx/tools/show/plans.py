"""Plans: of every attention that a model's layers have, who sees whom, who computes it, and what travels for it.

Knows configurations and plans; of a model its shapes alone. Sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from ringctx.asked.layers import layers_of
from ringctx.config import Config
from ringctx.core.attention import Attention
from ringctx.core.choose import Choice, Shape, choose
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern, Verdict
from ringctx.core.plan import Plan, make_plan
from ringctx.device import device_of, dtype_of
from ringctx.errors import ConfigError
from ringctx.huggingface.weights import checkpoint
from ringctx.kernels.base import accumulation_dtype

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
    if config.selects or config.carries:
        raise ConfigError(
            "What attention.select keeps and attention.carry forgets is known once a text is read; `ringctx show` draws plans."
        )
    model = model_of(config)
    asked = layers_of(config.attention, model)
    layers = asked if isinstance(asked, dict) else dict.fromkeys(range(model.num_hidden_layers), asked)
    layout = getattr(Layout, config.layout.kind)(tokens, ranks)
    different = dict.fromkeys(layers.values())
    return [_shown(config, model, one, [n for n, other in layers.items() if other == one], layout) for one in different]


def model_of(config: Config) -> Any:
    """The shapes of the model that a configuration names, or trains from scratch, as transformers calls them."""
    from transformers import AutoConfig, PretrainedConfig

    scratch = config.training.scratch
    if scratch.layers:
        return PretrainedConfig(
            num_hidden_layers=scratch.layers, num_attention_heads=scratch.heads, num_key_value_heads=scratch.key_heads,
            hidden_size=scratch.hidden, max_position_embeddings=config.training.context,
        )  # fmt: skip
    return AutoConfig.from_pretrained(checkpoint(config.model.path), local_files_only=True)


def _shown(config: Config, model: Any, asked: Attention | None, layers: list[int], layout: Layout) -> Shown:
    attention = asked or Attention()
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // heads
    patterns = tuple(pattern for _, seen in attention.parts(heads) for pattern, _ in seen)
    dtype = _dtype(config)
    shape = Shape(1, heads, key_heads, width, width, dtype.itemsize, accumulation_dtype(dtype).itemsize, backward=False)
    choice = choose(patterns, layout, layout, shape)
    moving = choice.transport if choice.transport in ("rotate", "fetch", "gather") else "rotate"
    plans = tuple(make_plan(patterns, layout, layout, rank, moving) for rank in range(layout.size))
    return Shown(_runs(layers), attention, patterns, layout, choice, plans, 2 * key_heads * width * dtype.itemsize)


def _dtype(config: Config) -> torch.dtype:
    return dtype_of(config.model, device_of(config.model))


def _runs(layers: list[int]) -> str:
    """Layers 0 to 2 and 5 as '0 to 2, 5'."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
