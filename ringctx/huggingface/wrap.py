"""wrap: a transformers model attends over the ring from now on.

transformers hands its attention interface keys that are already rotated. So the model's rotary module is made to turn
nothing (cos 1, sin 0), and its frequencies, which may differ by type of layer, become the encoding of each layer's `Attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ringctx.core.attention import Attention
from ringctx.core.pattern import Causal
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError, Unsupported
from ringctx.huggingface.context import Context
from ringctx.huggingface.families import attention_modules, family_of, rotary_module, tables_of
from ringctx.huggingface.shards import parts_of
from ringctx.methods.branches import rotated_by
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Softcap
from ringctx.patterns import window

IMPLEMENTATION = "ringctx"


class Still(nn.Module):
    """Stands where the rotary module stood and turns nothing: cos 1, sin 0, of the widths that it gave."""

    def __init__(self, context: Context, original: nn.Module, kinds: Iterable[str | None]) -> None:
        super().__init__()
        self.context = context
        self.__dict__["original"] = original  # not a submodule: it must not move, train or be saved
        device = next(original.buffers()).device
        first = (torch.zeros(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device))
        self.widths = {kind: original(*first, *([] if kind is None else [kind]))[0].shape[-1] for kind in kinds}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """x gives dtype and device; position_ids (1, s) are compared with the layout's indices."""
        self.context.check_positions(position_ids)
        width = self.widths[layer_type]
        return x.new_ones(1, 1, width), x.new_zeros(1, 1, width)


class Layer:
    """One layer's attention: what the model itself asks for, with what the user asked for on top. own: the model's encoding here."""

    def __init__(self, context: Context, index: int, asked: Attention, own: Rotary | None) -> None:
        self.context, self.index, self.asked, self.own = context, index, asked, own
        self._made: dict[tuple[Any, ...], Attention] = {}

    @property
    def rotates(self) -> bool:
        """Whether anything is turned by position here."""
        return any(encoding is not None for encoding in (self.asked.encoding, *(b.encoding for b in self.asked.branches)))

    def attention(self, *, scale: float | None, width: int | None, cap: float | None, sink: Tensor | None, dropout: float) -> Attention:
        """The model's window narrows the pattern; its cap, sink and scale fill what the user left open."""
        recalled = self.context.recalled
        key = (scale, width, cap, dropout, recalled)
        if key not in self._made:
            encoding = self.own if self.asked.branches else self.asked.encoding
            asked = replace(self.asked, pattern=Causal(), encoding=encoding, branches=(), select=None) if recalled else self.asked
            self._made[key] = replace(
                asked,
                pattern=asked.pattern & window(width) if width else asked.pattern,
                scores=(Softcap(cap), *asked.scores) if cap else asked.scores,
                scale=scale if asked.scale is None else asked.scale,
                dropout=dropout or asked.dropout,
            )
        made = self._made[key]  # without the sink: it may be another tensor at each call
        return made if sink is None or made.sink is not None else replace(made, sink=sink)


def wrap(
    model: nn.Module,
    ring: Ring,
    attention: Attention | Mapping[int, Attention] | None = None,
    *,
    transport: str = "auto",
    kernel: str = "auto",
) -> Context:
    """Make the model attend over the ring; returns its running state, which is also `model.ringctx`. On several ranks:

        with wrap(model, ring).running(layout):
            model(input_ids=layout.shard(ids, ring.rank), position_ids=layout.indices(ring.rank)[None], use_cache=False)

    attention: for all layers, or per layer number (layers left out keep the model's own). Its pattern stands for the
    model's causal one; a window that the model has in a layer narrows it further. Branches without frequencies get the
    model's own, and in a layer without rotation none.
    Raises Unsupported for families that were not checked and for rotary types that depend on the length.
    """
    family = family_of(model)
    if getattr(model, "ringctx", None) is not None:
        raise ConfigError("The model is wrapped already; call unwrap(model) before wrapping it for another ring or attention.")
    parent, name, original = rotary_module(model)
    modules = attention_modules(model)
    asked = attention if isinstance(attention, Mapping) else dict.fromkeys(range(len(modules)), attention)
    unknown = sorted(set(asked) - {int(m.layer_idx) for m in modules})  # type: ignore[arg-type]
    if unknown:
        raise ConfigError(f"attention names layers {unknown}, but the model has layers 0 to {len(modules) - 1}.")
    tables, context, plain = tables_of(original), Context(ring, transport, kernel, parts_of(model)), Attention()
    config: Any = model.config
    if context.parts > 1:
        _check_heads(asked.values(), config.num_attention_heads)
    rotated = cache(rotated_by)  # layers that are asked the same share one value, and so one table of angles
    for module in modules:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        own = tables[None if None in tables else config.layer_types[index]] if family.rotates(module) else None
        module.ringctx = Layer(context, index, rotated(asked.get(index) or plain, own), own)  # type: ignore[assignment]
    setattr(parent, name, Still(context, original, tables))
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    model.__dict__["_before_ringctx"] = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    model.__dict__["ringctx"] = context
    return context


def _check_heads(asked: Iterable[Attention | None], num_heads: int) -> None:
    """A rank of a row numbers its own heads from 0. Raises Unsupported for what depends on a head's number in the whole model."""
    for attention in filter(None, asked):
        what = {
            "a pattern that differs by head": len(attention.pattern.heads(num_heads)) > 1,
            "an additive score": bool(attention.additive),
            "a sink": attention.sink is not None,
            "dropout": attention.dropout > 0,
        }
        found = [name for name, is_asked in what.items() if is_asked]
        if found:
            raise Unsupported(
                f"The model is spread over ranks by heads (tensor parallel), but its attention was asked for {' and '.join(found)}, "
                "which go by a head's number in the whole model; load the model whole on each rank, or leave that out."
            )


def turn(model: nn.Module, encoding: Rotary) -> None:
    """From now on every layer of the wrapped model that rotates does it by this encoding; layers without rotation stay without.

    Keys that a cache holds rotated are not turned anew: call it before the prefill, on all ranks with the same encoding.
    """
    rotated = cache(partial(rotated_by, anew=True))
    for module in attention_modules(model):
        layer = module.ringctx
        assert isinstance(layer, Layer)
        if layer.rotates:
            module.ringctx = Layer(layer.context, layer.index, rotated(layer.asked, encoding), encoding)  # type: ignore[assignment]


def unwrap(model: nn.Module) -> None:
    """Give the model its own attention and rotary module back."""
    parent: nn.Module = getattr(model, "base_model", model)
    name = family_of(model).rotary
    setattr(parent, name, getattr(parent, name).__dict__["original"])
    for module in attention_modules(model):
        del module.ringctx
    model.set_attn_implementation(model.__dict__.pop("_before_ringctx"))  # type: ignore[operator]
    del model.__dict__["ringctx"]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (b h s d), key and value (b g s d)  ->  (b s h d), no weights."""
    layer = getattr(module, "ringctx", None)
    if layer is None:
        raise ConfigError("This model asks for attention 'ringctx' but was not wrapped; call ringctx.huggingface.wrap(model, ring).")
    if attention_mask is not None:
        raise Unsupported("A 4-d attention mask was given; say it as a Pattern instead: wrap(model, ring, Attention(pattern=...)).")
    dropout = dropout if module.training else 0.0
    if dropout and layer.context.parts > 1:
        raise Unsupported("Heads that are spread over ranks (tensor parallel) drop no weights; set attention_dropout to 0.")
    attention = layer.attention(scale=scaling, width=sliding_window, cap=softcap, sink=s_aux, dropout=dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return layer.context.attend(layer.index, q, k, v, attention), None


def _mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """transformers' mask interface: no mask is made, and padding is refused."""
    if attention_mask is not None and not bool(torch.as_tensor(attention_mask).all()):
        raise Unsupported(
            "The attention mask has zeros (padding). ringctx computes no padding: pass sequences one by one, "
            "or packed with patterns.documents(cu_seqlens)."
        )
