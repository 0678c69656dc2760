"""Bounds: how far logits of a layer can be apart, whatever tokens come, from the model's weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ringctx.errors import Unsupported
from ringctx.huggingface.families import attention_modules, rotary_module, tables_of

BOUNDED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose queries and keys are a product of a root-mean-square norm's output, perhaps with a bias or another such norm."""


@torch.no_grad()
def swings_of(model: nn.Module) -> tuple[float, ...]:
    """For each layer a number that no L_ij - L_ii reaches beyond, over all heads, queries i and keys j; before the model is wrapped.

    A norm of width D with weights w gives x with |x| <= sqrt(D) max|w|, so |W x| is at most sqrt(D) times the largest singular
    value of W diag(w), plus |bias|; rotation leaves norms alone but for its scaling; |L_ij - L_ii| <= s |q| (|k_j| + |k_i|).
    Raises Unsupported for families in which this was not derived.
    """
    config: Any = model.config
    if config.model_type not in BOUNDED:
        raise Unsupported(
            f"How far logits of a model of type {config.model_type!r} can be apart was not derived; known: {', '.join(BOUNDED)}. "
            "Set cache.evict.budgets or threshold instead of bound."
        )
    scaling = max(table.scaling for table in tables_of(rotary_module(model)[2]).values())
    layers = [layer for layer in model.modules() if hasattr(layer, "self_attn") and hasattr(layer, "input_layernorm")]
    assert len(layers) == len(attention_modules(model))
    return tuple(_swing(layer, config, scaling) for layer in layers)


def _swing(layer: Any, config: Any, scaling: float) -> float:
    module, weights = layer.self_attn, layer.input_layernorm.weight
    norm = lambda name, inner: _norms(getattr(module, name), weights, getattr(module, inner, None), module.head_dim)
    queries, keys = norm("q_proj", "q_norm"), norm("k_proj", "k_norm")
    pairs = queries * keys.repeat_interleave(len(queries) // len(keys))
    return float(pairs.max()) * 2 * module.scaling * scaling**2


def _norms(projection: Any, weights: Tensor, inner: Any, width: int) -> Tensor:
    """The largest norm of each head's output, (heads,)."""
    if inner is not None:
        heads = projection.weight.shape[0] // width
        return (inner.weight.double().abs().max() * width**0.5).expand(heads)
    matrices = (projection.weight.double() * weights.double()).unflatten(0, (-1, width))
    largest = torch.linalg.matrix_norm(matrices, 2) * len(weights) ** 0.5
    return largest if projection.bias is None else largest + projection.bias.double().view(-1, width).norm(dim=1)
