"""Which transformers models can be wrapped, and where their parts are.

Knows model types. A family is listed when a test shows that its wrapped logits are the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ringctx.errors import Unsupported
from ringctx.methods.extend import Trained
from ringctx.methods.rotary import Rotary

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies do not depend on how long the sequence is."""
_STATE = re.compile("(Mixer|MambaLayer|RecurrentBlock|Delta(Net|Attention)|ShortConv|(Linear|Lightning|RwkvSelf)Attention)$")
"""How the class names of modules end that scan the sequence."""


def _says(module: Any) -> bool:
    """Whether the attention module rotates: all do, but for those that say they do not."""
    return bool(getattr(module, "use_rope", True))


def _within_windows(module: Any) -> bool:
    """Whether the attention module rotates, in a family that does so only in layers with a window, or if there are none."""
    return module.sliding_window is None or module.is_sliding


@dataclass(frozen=True)
class Family:
    """Where a model of this type keeps its rotary module, and which of its attention modules rotate.

    All listed families rotate halves: dim p with dim p + w/2.
    """

    note: str = ""
    rotary: str = "rotary_emb"
    rotates: Callable[[Any], bool] = _says


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 1 to 3, SmolLM, SmolLM2, Yi and others of this shape"),
    "mistral": Family("a window in every layer where the configuration has one"),
    "qwen2": Family("a window in some layers where the configuration has one"),
    "qwen3": Family("normalised queries and keys"),
    "qwen3_moe": Family("experts"),
    "mixtral": Family("experts"),
    "granite": Family("its own softmax scale"),
    "olmo2": Family("normalised queries and keys"),
    "smollm3": Family("some layers without rotation"),
    "gemma2": Family("softcap, a window in every other layer"),
    "gemma3_text": Family("a window in most layers, and a rotary table of its own there; its own softmax scale"),
    "gpt_oss": Family("learned sinks, a window in every other layer, YaRN, experts"),
    "phi3": Family("queries, keys and values from one product; rotates a part of the dims where the configuration says so"),
    "olmo3": Family("normalised queries and keys, a window in most layers, and a rotary table of its own there"),
    "exaone4": Family("rotates only in layers with a window", rotates=_within_windows),
    "stablelm": Family("rotates a part of the dims"),
    "starcoder2": Family("a window where the configuration has one"),
}


def family_of(model: nn.Module) -> Family:
    """The model's row of the table. Raises Unsupported, naming the model type and what to do, when it has none."""
    kind = str(_config(model).model_type)
    states = [(name, type(module).__name__) for name, module in model.named_modules() if _STATE.search(type(module).__name__)]
    if states:
        raise Unsupported(
            f"Cannot wrap a model of type {kind!r}: {states[0][0]} ({states[0][1]}) carries a state along the sequence, which each rank "
            "would need from the rank before it, while ringctx sends keys and values alone. Train it on whole sequences, or use a model "
            "all of whose layers are attention."
        )
    if kind not in FAMILIES:
        raise Unsupported(
            f"Cannot wrap a model of type {kind!r}: its rotary encoding and attention were not checked against ringctx. "
            f"Checked types: {', '.join(FAMILIES)}. Use one of these, or add a row to ringctx/huggingface/families.py "
            "and its case to tests/unit/test_huggingface.py."
        )
    return FAMILIES[kind]


def rotary_module(model: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    """(the module that holds the rotary module, under which name, the rotary module).

    Raises Unsupported when its frequencies change with the length of the sequence.
    """
    family = family_of(model)
    parent: nn.Module = getattr(model, "base_model", model)
    rotary = getattr(parent, family.rotary)
    kinds = getattr(rotary, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if kind not in STATIC_ROPE:
            raise Unsupported(
                f"The model's rotary type is {kind!r}, whose frequencies depend on the length of the sequence; "
                f"supported types: {', '.join(STATIC_ROPE)}. Set rope_parameters in the checkpoint's config.json to one of them"
                + (", and its factors in attention.positions of kind longrope." if kind == "longrope" else ".")
            )
    return parent, family.rotary, rotary


def tables_of(rotary: Any) -> dict[str | None, Rotary]:
    """A rotary module's encodings by type of layer; a single one, under None, where all layers share it."""
    kinds = getattr(rotary, "layer_types", None)
    prefixes = {None: ""} if kinds is None else {kind: f"{kind}_" for kind in kinds}

    def table(prefix: str) -> Rotary:
        frequencies, scaling = (getattr(rotary, prefix + name) for name in ("inv_freq", "attention_scaling"))
        return Rotary(tuple(frequencies.float().tolist()), float(scaling))

    return {kind: table(prefix) for kind, prefix in prefixes.items()}


def trained_of(model: nn.Module) -> Trained:
    """What the model's rotary encoding was trained with, asked before it is wrapped.

    Raises Unsupported when its frequencies are not plain powers of a base, because they were rescaled already, or are several.
    """
    _, _, rotary = rotary_module(model)
    config, kind = _config(model), getattr(rotary, "rope_type", "default")
    if isinstance(kind, dict):
        raise Unsupported(
            f"The model rotates by a table of its own in each type of layer ({', '.join(kind)}), which no method extends together. "
            "Leave attention.positions out, or set rope_parameters in the checkpoint's config.json."
        )
    if kind != "default":
        raise Unsupported(
            f"The model's rotary frequencies are rescaled already (type {kind!r}), so they cannot be extended once more. "
            "Leave attention.positions out, or set rope_type to 'default' in the checkpoint's config.json."
        )
    own = torch.as_tensor(rotary.inv_freq).float().cpu()
    found = Trained(2 * len(own), float(config.rope_parameters["rope_theta"]), int(config.max_position_embeddings))
    if not torch.allclose(own, torch.tensor(found.rotary.frequencies), rtol=1e-5, atol=0):
        raise Unsupported(
            f"The model's rotary frequencies are not the powers of its base {found.base:g}, so no method knows how to extend them. "
            "Leave attention.positions out."
        )
    return found


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The model's self-attention modules in layer order.

    Raises Unsupported when one of them is not causal.
    """
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal") and hasattr(m, "o_proj")]
    bidirectional = [m.layer_idx for m in modules if not m.is_causal]
    if bidirectional:
        raise Unsupported(f"Layers {bidirectional} are not causal; ringctx wraps decoders. Use ring_attention directly for encoders.")
    return sorted(modules, key=lambda m: int(m.layer_idx))  # type: ignore[arg-type]


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise Unsupported(f"{type(model).__name__} is not a transformers model; call ring_attention from your own module instead.")
    return config
