"""Selecting: the selector that a configuration asks for, in the layers that it is asked for.

Knows the configuration and the selectors. Knows nothing of models or ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from ringctx.config import SelectConfig
from ringctx.core.attention import Attention
from ringctx.core.select import Selector
from ringctx.errors import ConfigError
from ringctx.methods.selectors import AShape, FlexPrefill, Moba, Quest, Representatives, Sparge, VerticalSlash, XAttention

KINDS: dict[str, type[Any]] = {
    "vertical_slash": VerticalSlash,
    "a_shape": AShape,
    "flex_prefill": FlexPrefill,
    "x_attention": XAttention,
    "sparge": Sparge,
    "quest": Quest,
    "representatives": Representatives,
    "moba": Moba,
}
"""attention.select.kind -> the selector."""

_OTHERWISE = {"quest": {"blocks": "pages", "block": "page"}}
"""Where a selector calls a key by another name."""


def selector_of(config: SelectConfig) -> Selector | None:
    """The selector of a configuration, with its own defaults where that says nothing; None for kind none."""
    if config.kind == "none":
        return None
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in ("kind", "dense_layers")}
    names = _OTHERWISE.get(config.kind, {})
    selector: Selector = KINDS[config.kind](**{names.get(name, name): value for name, value in given.items() if value is not None})
    return selector


def selecting(asked: Attention | None, config: SelectConfig, num_layers: int) -> Attention | dict[int, Attention] | None:
    """What is asked of each layer, with the selector in all but the first `dense_layers`. Raises ConfigError when none is left."""
    selector = selector_of(config)
    if selector is None:
        return asked
    if config.dense_layers >= num_layers:
        raise ConfigError(
            f"attention.select.dense_layers is {config.dense_layers}, but the model has {num_layers} layers; leave some to select."
        )
    plain = asked or Attention()
    return {layer: replace(plain, select=selector if layer >= config.dense_layers else None) for layer in range(num_layers)}
