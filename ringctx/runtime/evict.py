"""Evict: a policy applied to the cache, layer by layer, as soon as the layer's attention is done.

Knows when: at the end of a prompt, of each chunk if so asked, and after each token for policies that ask for it. What is
dropped is decided over the ring and applied on each rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ringctx.config import EvictConfig
from ringctx.core.attention import Attention
from ringctx.core.ring import Ring
from ringctx.core.visiting import encoded, sums_explicit, sums_here
from ringctx.errors import ConfigError
from ringctx.methods.eviction import H2O, CachePolicy, Duo, Forgotten, Held, PyramidKV, SnapKV, Streaming, keep, parted
from ringctx.runtime.cache import KVCache


@dataclass
class Evictor:
    """A policy for all layers.

    each_chunk: also after each chunk, so that reading is bounded too. prompt: the tokens that are read up to the next eviction;
    None while nobody knows where they end.
    """

    policy: CachePolicy
    num_layers: int
    each_chunk: bool = False
    prompt: range | None = None

    def attended(
        self, layer: int, q: Tensor, lse: Tensor, i: Tensor, attention: Attention, cache: KVCache, ring: Ring, begin: int, *, decoding: bool
    ) -> None:
        """A layer's attention is done and its keys are in the cache: q (b s h d), not encoded, of indices i (s), lse (b s h).

        begin: the first index of this call's tokens on any rank. decoding: q is the same on every rank. All ranks call it together.
        """
        if decoding and not self.policy.at_steps:
            return
        end = cache.layout.length
        stretch = self.prompt
        if decoding or self.each_chunk or stretch is None and self.policy.accumulates:
            stretch = range(begin, end)
        if stretch is None:
            return
        voters = self.policy.voters(stretch.start, stretch.stop)
        some = range(max(voters.start, begin), min(voters.stop, end))
        if some:
            self._vote(layer, q, lse, i, some, attention, cache, ring, decoding)
        if decoding or self.each_chunk or (self.prompt is not None and end == self.prompt.stop):
            self._evict(layer, cache, ring, len(voters))
            if not self.policy.accumulates:
                cache.vote(layer, None)

    def _vote(
        self, layer: int, q: Tensor, lse: Tensor, i: Tensor, voters: range, attention: Attention, cache: KVCache, ring: Ring, same: bool
    ) -> None:
        """Add to each key what these queries give it, averaged over the query heads that share it."""
        rows = ((i >= voters.start) & (i < voters.stop)).nonzero()[:, 0]
        q, lse, i = q[:, rows], lse[:, rows], i[rows]
        parts = cache.parts(layer, attention)
        if same:
            turned, parts = encoded(attention, q, i, parts)
            given = sums_here(attention, turned, lse, i, parts)
        else:
            given = sums_explicit(q, lse, parts, i=i, ring=ring, attention=attention)
        cache.vote(layer, [x.double().unflatten(1, (len(part.heads), -1)).mean(2) for x, part in zip(given, parts, strict=True)])

    def _evict(self, layer: int, cache: KVCache, ring: Ring, num_voters: int) -> None:
        """Ask the policy and drop what it does not keep."""
        length = cache.layout.length
        budget = self.policy.budget(layer, self.num_layers, length)
        carry = cache.carry(layer) if layer in cache.carried else None
        choices = []
        for part, mass in zip(cache.parts(layer), cache.masses(layer), strict=True):
            held = Held(ring, layer, self.num_layers, length, part.heads, part.k, part.v, part.indices, mass, num_voters, carry)
            choices.append(keep(ring, self.policy.score(held), part.indices, budget))
        if any(drops for _, _, drops in choices):
            cache.evict(layer, [kept for kept, _, _ in choices], [parted(number) for _, number, _ in choices])


def evictor_of(config: EvictConfig, num_layers: int, num_heads: int, swings: tuple[float, ...] = ()) -> Evictor | None:
    """What the configuration asks for of a model with so many layers and key heads, or None for nothing. swings: `swings_of`.

    Raises ConfigError for a head that the model has not.
    """
    policy: CachePolicy
    match config.kind:
        case "none":
            return None
        case "streaming":
            policy = Streaming(config.sinks, config.recent)
        case "duo":
            heads = frozenset((int(layer), int(head)) for layer, head in (name.split(".") for name in config.streaming))
            wrong = sorted((layer, head) for layer, head in heads if layer >= num_layers or head >= num_heads)
            if wrong:
                raise ConfigError(
                    f"cache.evict.streaming names {wrong[0][0]}.{wrong[0][1]}, but the model has layers 0 to {num_layers - 1} "
                    f"with key heads 0 to {num_heads - 1}; name heads that it has."
                )
            policy = Duo(config.sinks, config.recent, heads)
        case "h2o":
            policy = H2O(config.heavy, config.recent)
        case "snapkv":
            policy = SnapKV(config.keys, config.window, config.kernel, config.pooling)
        case "pyramidkv":
            policy = PyramidKV(config.keys, config.window, config.kernel, config.pooling, config.beta)
        case "forgotten":
            if len(config.budgets) not in (0, 1, num_layers):
                raise ConfigError(
                    f"cache.evict.budgets has {len(config.budgets)} numbers, but the model has {num_layers} layers; give 1, or 1 a layer."
                )
            keys = config.budgets[0] if len(config.budgets) == 1 else config.budgets or None
            policy = Forgotten(keys, math.inf if config.threshold is None else config.threshold, config.bound or 0.0, swings)
    return Evictor(policy, num_layers, config.each_chunk)
