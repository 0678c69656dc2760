"""Tiles of tokens: MLPs and logits that never exist for all of a rank's tokens at once, forward or backward.

A tile is computed again in backward. Every rank computes equally many tiles, since gathering weights (ZeRO-3, FSDP2) is a collective.
Source: Arctic Long Sequence Training (Bekman et al. 2025, arXiv 2506.13996), tiled logits and TiledMLP.
Knows the model's own modules. Knows no engine. Letters: b sequences, s tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ringctx.errors import ConfigError, Unsupported
from ringctx.training.loss import Gather, token_sum


@dataclass
class Tiles:
    """size: the most tokens of a tile. count: tiles of the batch at hand, the same on every rank; they may be empty."""

    size: int
    count: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"tile is {self.size}; it is the most tokens whose MLP and logits exist at a time, 1 or more.")

    def agree(self, num_tokens: int, gather: Gather) -> None:
        """Count tiles for a batch of which this rank has so many tokens. All ranks call it together."""
        self.count = max(int(count) for count in gather(torch.tensor([-(-num_tokens // self.size)])))

    def each(self, of_tile: Callable[..., Tensor], *whole: Tensor) -> list[Tensor]:
        """of_tile of each tile of these tensors (b s ...), in order."""
        parts = zip(*(x.tensor_split(self.count, dim=1) for x in whole), strict=True)
        again = torch.is_grad_enabled() and any(x.requires_grad for x in whole)
        return [checkpoint(of_tile, *part, use_reentrant=False) if again else of_tile(*part) for part in parts]


def tiled_sum(model: Any, forward: Callable[..., Any], tiles: Tiles, labels: Tensor, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model's output without logits, and the sum of -log p of its labels (b s).

    forward: the model's own; what it does behind its body (head, caps, scales) is done to each tile by its own code.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    body = getattr(model, model.base_model_prefix)
    hidden = body(**inputs).last_hidden_state

    def of_tile(states: Tensor, answers: Tensor) -> Tensor:
        with _gives(body, states):
            return token_sum(forward(input_ids=answers, use_cache=False).logits, answers)

    return CausalLMOutputWithPast(), torch.stack(tiles.each(of_tile, hidden, labels)).sum()


@contextmanager
def _gives(body: nn.Module, states: Tensor) -> Iterator[None]:
    """Calls of the body give these states."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    before = body.__dict__.get("forward")
    body.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        del body.forward
        if before is not None:
            body.forward = before


def tile_mlps(model: nn.Module, tiles: Tiles) -> None:
    """Make every layer's MLP work on a tile at a time. Raises Unsupported where tokens are routed between MLPs, or there is none."""
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "mlp"]
    if not found:
        raise Unsupported(f"{type(model).__name__} has no modules called mlp to be tiled; leave tile out.")
    if any(hasattr(module, "experts") for module in found):
        raise Unsupported(f"{type(model).__name__} routes tokens to experts, and tiles would be routed one by one; leave tile out.")
    for module in found:
        module.forward = _in_tiles(module.forward, tiles)


def _in_tiles(forward: Callable[[Tensor], Tensor], tiles: Tiles) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat(tiles.each(forward, x), dim=1)
