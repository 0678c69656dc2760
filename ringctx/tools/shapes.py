"""Shapes: what a plan must know of a model, from its configuration or by name; no weights.

Knows transformers' names for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ringctx.asked.layers import layers_of
from ringctx.config import Config
from ringctx.core.attention import Attention
from ringctx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of a decoder with gated MLPs (Llama and its kin). width: of a head. trained: tokens of context, None where it is not said."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    width: int
    intermediate: int
    vocabulary: int
    trained: int | None = None
    tied: bool = False

    @property
    def layer_params(self) -> int:
        """Weights of one layer's matrices."""
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.key_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def read_params(self) -> int:
        """Weights that a token meets while it is read: of the last layer those that make queries, keys and values."""
        return (self.layers - 1) * self.layer_params + self.hidden * self.width * (self.heads + 2 * self.key_heads)

    @property
    def params(self) -> int:
        """Weights of all matrices, embedding and logits counted once each, or once together where they are tied."""
        return self.layers * self.layer_params + (2 - self.tied) * self.vocabulary * self.hidden

    @property
    def values_a_token(self) -> int:
        """Numbers that a layer's key and value of one token are."""
        return 2 * self.key_heads * self.width


KNOWN = {
    "llama-3-8b": Shapes(layers=32, hidden=4096, heads=32, key_heads=8, width=128, intermediate=14336, vocabulary=128256, trained=131072),
    "llama-3-70b": Shapes(layers=80, hidden=8192, heads=64, key_heads=8, width=128, intermediate=28672, vocabulary=128256, trained=131072),
    "llama-3-405b": Shapes(
        layers=126, hidden=16384, heads=128, key_heads=8, width=128, intermediate=53248, vocabulary=128256, trained=131072
    ),
}
"""Models by name, as their publishers describe them (Llama Team 2024, arXiv 2407.21783, table 3)."""


def shapes_of(config: Config) -> Shapes:
    """Of the model that a configuration names, or trains from scratch; names of KNOWN need no weights here."""
    scratch = config.training.scratch
    if scratch.layers:
        return Shapes(
            layers=scratch.layers, hidden=scratch.hidden, heads=scratch.heads, key_heads=scratch.key_heads,
            width=scratch.hidden // scratch.heads, intermediate=scratch.intermediate, vocabulary=scratch.vocabulary or 0,
            trained=config.training.context,
        )  # fmt: skip
    if config.model.path in KNOWN:
        return KNOWN[config.model.path]
    from transformers import AutoConfig

    from ringctx.huggingface.weights import checkpoint

    return of_model(AutoConfig.from_pretrained(checkpoint(config.model.path), local_files_only=True))


def of_model(model: Any) -> Shapes:
    """From transformers' configuration."""
    return Shapes(
        layers=model.num_hidden_layers, hidden=model.hidden_size, heads=model.num_attention_heads, key_heads=model.num_key_value_heads,
        width=getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads,
        intermediate=model.intermediate_size, vocabulary=model.vocab_size, trained=getattr(model, "max_position_embeddings", None),
        tied=bool(getattr(model, "tie_word_embeddings", False)),
    )  # fmt: skip


def by_layer(config: Config, shapes: Shapes) -> dict[int, Attention]:
    """The attention of each layer. Raises ConfigError for what cannot be planned before a text is read, as selectors and carries."""
    if config.selects or config.carries:
        raise ConfigError("What attention.select keeps and attention.carry forgets is known once a text is read; leave them out to plan.")
    model = SimpleNamespace(
        num_hidden_layers=shapes.layers, num_attention_heads=shapes.heads, max_position_embeddings=shapes.trained
    )  # fmt: skip
    asked = layers_of(config.attention, model)
    return asked if isinstance(asked, dict) else dict.fromkeys(range(shapes.layers), asked or Attention())


def folder_of(config: Config) -> Path | None:
    """The checkpoint's folder, or None where a model is known by its shapes alone."""
    from ringctx.huggingface.weights import checkpoint

    return None if config.training.scratch.layers or config.model.path in KNOWN else checkpoint(config.model.path)


def file_of(folder: Path | None, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights that are held beside the model's while it is loaded: none where they are mapped as they are."""
    from safetensors import safe_open

    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if not files:
        return 0
    with safe_open(files[0], "pt") as opened:
        held = opened.get_tensor(next(iter(opened.keys()))).dtype
    return 0 if held == dtype else sum(file.stat().st_size for file in files)
