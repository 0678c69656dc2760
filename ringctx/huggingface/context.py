"""Context: what a wrapped model needs to know while it runs. One object per model, no globals.

Knows the ring, where this call's tokens live, and the cache. Knows nothing of tokenizers or sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.decode import decode_attention
from ringctx.core.entry import ring_attention
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.plan import wanted
from ringctx.core.ring import Ring
from ringctx.core.tiles import Spans
from ringctx.errors import ConfigError, LayoutError
from ringctx.huggingface.shards import lost


class Cache(Protocol):
    """This rank's keys, before rotation, and values, per layer."""

    @property
    def layout(self) -> Layout:
        """Where the cached keys live, this call's tokens included."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep what belongs to this rank of this call's k, v (b n g d)."""

    def read(self, layer: int, spans: Spans | None = None) -> tuple[Tensor, Tensor]:
        """This rank's keys, before rotation, and values (b n g d), in the order of the layout's indices; or those at these positions."""

    def encoded(self, layer: int, attention: Attention, spans: Spans | None = None) -> Tensor | None:
        """This rank's keys, rotated, or those at these positions; None where the cache does not keep them."""


@dataclass
class Context:
    """The running state of a wrapped model.

    layout: where this call's tokens live; None while the ring is alone and the caller did not say, or during decode.
    after_layer: called with the layer's number when its attention is done (progress).
    parts: over how many ranks the weights are spread, each with its own heads.
    patterns: who saw whom in each layer's latest attention, the model's own windows included.
    """

    ring: Ring
    transport: str = "auto"
    kernel: str = "auto"
    parts: int = 1
    layout: Layout | None = None
    cache: Cache | None = None
    decoding: bool = False
    after_layer: Callable[[int], None] | None = None
    patterns: dict[int, Pattern] = field(default_factory=dict)
    seconds: float = field(default=0.0)
    """Spent inside attention, waiting for other ranks included (on CPUs; a GPU runs behind)."""

    @contextmanager
    def running(self, layout: Layout | None = None, cache: Cache | None = None, *, decoding: bool = False) -> Iterator[Context]:
        """For the calls inside: tokens live as `layout` says (or are replicated, when decoding), keys go to `cache`."""
        if layout is not None and layout.size != self.ring.size:
            raise LayoutError(f"The layout is for {layout.size} ranks, but the ring has {self.ring.size}.")
        if decoding and cache is None:
            raise ConfigError("Decoding needs the cache that the prefill filled; pass cache=.")
        before = (self.layout, self.cache, self.decoding)
        self.layout, self.cache, self.decoding = layout, cache, decoding
        try:
            yield self
        except RuntimeError as error:
            if self.parts > 1 and (sentence := lost(error)):
                raise sentence from error
            raise
        finally:
            self.layout, self.cache, self.decoding = before

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """One layer's attention: q (b s h d), k and v (b s g d), none of them rotated  ->  (b s h d)."""
        began = time.perf_counter()
        out = self._decode(layer, q, k, v, attention) if self.decoding else self._whole(layer, q, k, v, attention)
        self.seconds += time.perf_counter() - began
        self.patterns[layer] = attention.pattern
        if self.after_layer:
            self.after_layer(layer)
        return out

    def _whole(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        layout = self._layout_of(q.shape[1])
        num_own = layout.count(self.ring.rank)
        own_q, own_k, own_v = q[:, :num_own], k[:, :num_own], v[:, :num_own]
        key_layout = None
        if self.cache is not None:
            self.cache.append(layer, own_k, own_v)
            if self.cache.layout != layout:  # a later chunk: the keys of the earlier ones are in the cache
                key_layout, spans = self._wanted(attention, q.shape[2], layout)
                own_k, own_v = self.cache.read(layer, spans)
        where = partial(ring_attention, ring=self.ring, layout=layout, key_layout=key_layout)
        out = where(own_q, own_k, own_v, attention=attention, transport=self.transport, kernel=self.kernel)
        assert isinstance(out, Tensor)
        if num_own == q.shape[1]:
            return out
        return torch.cat((out, out.new_zeros(*q.shape[:1], q.shape[1] - num_own, *out.shape[2:])), dim=1)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        assert self.cache is not None
        self.cache.append(layer, k, v)
        new = range(self.cache.layout.length - q.shape[1], self.cache.layout.length)
        key_layout, spans = self._wanted(attention, q.shape[2], Layout(((new,), *((),) * (self.ring.size - 1))))
        if key_layout.length < new.stop:  # the newest key is not seen by itself, but decoding counts queries back from it
            key_layout, spans = self.cache.layout, ((0, self.cache.layout.count(self.ring.rank)),)
        keys, values = self.cache.read(layer, spans)
        rotated = self.cache.encoded(layer, attention, spans)
        if rotated is not None and attention.encoding is not None:
            q, keys = attention.encoding.queries(q, torch.arange(new.start, new.stop, device=q.device)), rotated
            attention = replace(attention, encoding=None)
        return decode_attention(q, keys, values, key_layout=key_layout, ring=self.ring, attention=attention)

    def _wanted(self, attention: Attention, num_heads: int, queries: Layout) -> tuple[Layout, Spans]:
        """Of the cached keys those that these queries see: where they live, and this rank's positions. A window leaves most alone."""
        assert self.cache is not None
        patterns = tuple(pattern for _, pattern in attention.pattern.heads(num_heads))
        key_layout, spans = wanted(patterns, queries, self.cache.layout)
        return key_layout, spans[self.ring.rank]

    def _layout_of(self, num_tokens: int) -> Layout:
        """This call's layout. A rank that owns no token is fed one all the same, because transformers takes no empty input."""
        layout = self.layout
        if layout is None:
            if self.ring.size > 1:
                raise ConfigError(
                    f"The model runs on {self.ring.size} ranks, but nobody said where its tokens live. "
                    "Call it inside `with context.running(layout):`."
                )
            layout = Layout.contiguous(num_tokens, 1)
        if num_tokens != max(layout.count(self.ring.rank), 1):
            raise LayoutError(
                f"Rank {self.ring.rank} was given {num_tokens} tokens, but the layout gives it {layout.count(self.ring.rank)}; "
                "pass layout.shard(ids, ring.rank), and one token of any kind where the layout gives none."
            )
        return layout

    def check_positions(self, position_ids: Tensor) -> None:
        """Position ids must be the layout's indices: ringctx rotates by index, so others would be lost in silence.

        Raises LayoutError, saying what to pass.
        """
        if self.decoding:
            return
        layout = self._layout_of(position_ids.shape[-1])
        indices = layout.indices(self.ring.rank, position_ids.device)
        if len(indices) and not bool((position_ids == indices).all()):
            raise LayoutError(
                f"Rank {self.ring.rank} was given position ids {_ends(position_ids.flatten())}, "
                f"but its tokens' indices are {_ends(indices)}. "
                "Pass position_ids=layout.indices(ring.rank)[None]; packed documents need no restart, since rotation is relative."
            )


def _ends(numbers: Tensor) -> str:
    """The first few and the last of some numbers, for a message."""
    few = ", ".join(str(n) for n in numbers[:4].tolist())
    return few if len(numbers) <= 4 else f"{few}, … {int(numbers[-1])}"
