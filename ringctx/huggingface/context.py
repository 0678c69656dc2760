"""Context: what a wrapped model needs to know while it runs. One object per model, no globals.

Knows the ring, where this call's tokens live, and the cache. Knows nothing of tokenizers or sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.decode import decode_explicit, decode_with_lse
from ringctx.core.entry import carried_attention, ring_attention
from ringctx.core.explicit import Keys
from ringctx.core.forgetting import attend_forgetting
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.plan import wanted
from ringctx.core.ring import Ring, collective
from ringctx.core.select import Selector, Sight
from ringctx.core.tiles import Spans
from ringctx.core.visiting import attend_explicit
from ringctx.device import trim_freed_memory
from ringctx.errors import ConfigError, LayoutError

MANY, TRIM_EVERY = 1024, 8
"""Tokens of a layer from which on its freed memory matters, and of how many such layers it is let go together: each time costs page
faults, 18 % of the time of reading when after every layer, at most 2.5 % after every eighth.
"""


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

    def is_evicted(self, layer: int) -> bool:
        """Whether keys of this layer were dropped; then only `parts` has the others."""

    def parts(self, layer: int, attention: Attention | None = None) -> list[Keys]:
        """This rank's keys at explicit indices, rotated where the cache keeps them so, and values."""

    def carry(self, layer: int, spans: Spans | None = None) -> Tensor:
        """What this rank's keys carry, or those at these positions, (b n)."""

    def carry_on(self, layer: int, carry: Tensor, spans: Spans | None = None) -> None:
        """Keep what they carry now."""


class Evictor(Protocol):
    """Who drops keys of a layer when its attention is done."""

    def attended(
        self, layer: int, q: Tensor, lse: Tensor, i: Tensor, attention: Attention, cache: Any, ring: Ring, begin: int, *, decoding: bool
    ) -> None:
        """q (b s h d), not encoded, of indices i (s); lse (b s h); begin: the first index of this call's tokens on any rank."""


class KeysCached(Exception):
    """The last keys that were wanted are in the cache, so the rest of the model need not be computed."""


@dataclass
class Context:
    """The running state of a wrapped model.

    layout: where this call's tokens live; None while the ring is alone and the caller did not say, or during decode.
    documents: of a packed batch, who shares a document; it narrows what every layer was asked.
    after_layer: called with the layer's number when its attention is done (progress).
    asked: called with each layer's number, queries (b s h d) and keys (b s g d) before rotation, and attention.
    recalled: the cache holds just what is to be seen, so what was asked for long texts (window, branches, selection) gives way.
    last_layer: this layer's keys are the last that are wanted: once they are cached, `KeysCached` ends the model's forward.
    evictor: drops keys of the cache, layer by layer, or None.
    patterns: who saw whom in each layer's latest attention, the model's own windows included, and what a selector chose.
    chunks: the same for every chunk of the sequence that was prefilled last, each with its layout.
    parts: over how many ranks the weights are spread, each with its own heads.
    only_running: whether attention outside `running` is refused, as of a job, whose batches say where tokens live.
    """

    ring: Ring
    transport: str = "auto"
    kernel: str = "auto"
    parts: int = 1
    only_running: bool = False
    layout: Layout | None = None
    documents: Pattern | None = None
    cache: Cache | None = None
    decoding: bool = False
    after_layer: Callable[[int], None] | None = None
    asked: Callable[[int, Tensor, Tensor, Attention], None] | None = None
    recalled: bool = False
    last_layer: int | None = None
    evictor: Evictor | None = None
    patterns: dict[int, Pattern] = field(default_factory=dict)
    chunks: dict[int, list[tuple[Layout, Pattern]]] = field(default_factory=dict)
    is_running: bool = False
    num_cached: int = field(default=0, init=False)
    memories: dict[int, Tensor] = field(default_factory=dict)
    """Of layers whose keys carry something, without a cache: the latest call's memory (b s), with its gradient (`Carried.memory`)."""
    seconds: float = field(default=0.0)
    """Spent inside attention, waiting for other ranks included (on CPUs; a GPU runs behind)."""

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """For the calls inside: the cache holds what was recalled, all of which is to be seen."""
        self.recalled = True
        try:
            yield
        finally:
            self.recalled = False

    @contextmanager
    def caching(self, layout: Layout | None, cache: Cache, last_layer: int, *, decoding: bool = False) -> Iterator[None]:
        """For the one call of the model inside: it ends when the keys of this layer are in the cache; nothing comes out."""
        self.last_layer = last_layer
        try:
            with self.running(layout, cache, decoding=decoding), suppress(KeysCached):
                yield
        finally:
            self.last_layer = None

    @contextmanager
    def running(
        self, layout: Layout | None = None, cache: Cache | None = None, *, decoding: bool = False, documents: Pattern | None = None
    ) -> Iterator[Context]:
        """For the calls inside: tokens live as `layout` says (or are replicated, when decoding), keys go to `cache`."""
        if layout is not None and layout.size != self.ring.size:
            raise LayoutError(f"The layout is for {layout.size} ranks, but the ring has {self.ring.size}.")
        if decoding and cache is None:
            raise ConfigError("Decoding needs the cache that the prefill filled; pass cache=.")
        before = (self.layout, self.documents, self.cache, self.decoding, self.is_running)
        self.layout, self.documents, self.cache, self.decoding, self.is_running = layout, documents, cache, decoding, True
        try:
            with collective("a sum over ranks with other parts of the same weights" if self.parts > 1 else "gathering weights"):
                yield self
        finally:
            self.layout, self.documents, self.cache, self.decoding, self.is_running = before

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """One layer's attention: q (b s h d), k and v (b s g d), none of them rotated  ->  (b s h d)."""
        if self.documents is not None and torch.compiler.is_compiling():
            return self._attend_uncompiled(layer, q, k, v, attention)
        began = _now()
        if self.documents is not None:
            attention = replace(attention, pattern=attention.pattern & self.documents)
        if self.asked:
            self.asked(layer, q, k, attention)
        is_wanted = layer != self.last_layer
        watched = Watched(attention.select) if attention.select is not None else None
        asked = replace(attention, select=watched) if watched else attention
        attend = self._decode if self.decoding else self._whole
        out = attend(layer, q, k, v, asked, is_wanted)
        self.seconds += _now() - began
        if not self.recalled:
            self._note(layer, attention.seen & watched.chosen if watched and watched.chosen else attention.seen, q.shape[1])
        if self.after_layer:
            self.after_layer(layer)
        if not is_wanted:
            raise KeysCached
        return out

    @torch.compiler.disable(reason="each packed batch has documents of its own, whose plan no graph can hold")
    def _attend_uncompiled(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        return self.attend(layer, q, k, v, attention)

    def _note(self, layer: int, pattern: Pattern, num_tokens: int) -> None:
        self.patterns[layer] = pattern
        if not self.decoding:
            layout, before = self._layout_of(num_tokens), self.chunks.get(layer, [])
            first = layout.length - sum(map(layout.count, range(layout.size)))
            goes_on = bool(before) and before[-1][0].length == first
            self.chunks[layer] = [*(before if goes_on else []), (layout, pattern)]

    def _whole(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention, is_wanted: bool) -> Tensor:
        layout = self._layout_of(q.shape[1])
        num_own = layout.count(self.ring.rank)
        own_q, own_k, own_v = q[:, :num_own], k[:, :num_own], v[:, :num_own]
        self._trim(own_q)
        if self.cache is not None and not is_wanted:
            self.cache.append(layer, own_k, own_v)
            return q
        if self.cache is not None and self.cache.is_evicted(layer):
            out, lse = self._beside(layer, own_q, own_k, own_v, attention, layout)
        else:
            out, lse = self._over(layer, own_q, own_k, own_v, attention, layout)
        self._evict(layer, own_q, lse, layout.indices(self.ring.rank, q.device), attention, layout)
        if num_own == q.shape[1]:
            return out
        return torch.cat((out, out.new_zeros(*q.shape[:1], q.shape[1] - num_own, *out.shape[2:])), dim=1)

    def _trim(self, q: Tensor) -> None:
        """Now and then, where a cache takes many keys on a CPU, let go of the room of earlier layers' activations."""
        if self.cache is not None and q.device.type == "cpu" and q.shape[1] >= MANY:
            self.num_cached += 1
            if self.num_cached % TRIM_EVERY == 0:
                trim_freed_memory()

    def _over(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention, layout: Layout) -> tuple[Tensor, Tensor]:
        """Attention over the ring to this call's tokens, and to all before them if there is a cache: out (b s h d), lse (b s h)."""
        key_layout = spans = None
        if self.cache is not None:
            self.cache.append(layer, k, v)
            if self.cache.layout != layout:  # a later chunk: the keys of the earlier ones are in the cache
                key_layout, spans = self._wanted(attention, q.shape[2], layout)
                k, v = self.cache.read(layer, spans)
        asked: dict[str, Any] = {"ring": self.ring, "layout": layout, "key_layout": key_layout, "attention": attention}
        asked |= {"transport": self.transport, "kernel": self.kernel}
        if attention.carry is None:
            out, lse = ring_attention(q, k, v, **asked, return_lse=True)
            return out, lse
        found = carried_attention(q, k, v, **asked, carry=None if self.cache is None else self.cache.carry(layer, spans))
        if self.cache is None:
            self.memories[layer] = found.memory
        elif found.carry is not None:
            self.cache.carry_on(layer, found.carry, spans)
        return found.out, found.lse

    def _beside(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention, layout: Layout) -> tuple[Tensor, Tensor]:
        """Attention to this call's tokens, merged with that to what eviction left of those before: out (b s h d), lse (b s h)."""
        assert self.cache is not None
        indices, sinkless = layout.indices(self.ring.rank, q.device), replace(attention, sink=None)
        parts, carry = self.cache.parts(layer, attention), None
        if attention.carry is not None:
            (part,), old = parts, self.cache.carry(layer)
            total, old = attend_forgetting(q, part, old, i=indices, layout=layout, ring=self.ring, attention=sinkless)
            asked: dict[str, Any] = {"attention": sinkless, "transport": self.transport, "kernel": self.kernel}
            found = carried_attention(q, k, v, ring=self.ring, layout=layout, carry=old.new_zeros(k.shape[:2]), **asked)
            total.merge_(found.out, found.lse)
            assert found.carry is not None
            carry = torch.cat((old, found.carry), 1)
        else:
            total = attend_explicit(q, parts, i=indices, ring=self.ring, attention=sinkless)
            where = partial(ring_attention, ring=self.ring, layout=layout, return_lse=True)
            total.merge_(*where(q, k, v, attention=sinkless, transport=self.transport, kernel=self.kernel))
        if attention.sink is not None:
            total.add_sink_(attention.sink)
        self.cache.append(layer, k, v)
        if carry is not None:
            self.cache.carry_on(layer, carry)
        return total.out.to(q.dtype), total.lse

    def _evict(self, layer: int, q: Tensor, lse: Tensor, i: Tensor, attention: Attention, layout: Layout) -> None:
        """Let the evictor drop keys, if there is one. layout: of this call's tokens."""
        if self.evictor is not None and self.cache is not None:
            begin = min(r[0] for ranges in layout.spans for r in ranges)
            with torch.no_grad():
                self.evictor.attended(layer, q, lse, i, attention, self.cache, self.ring, begin, decoding=self.decoding)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attention: Attention, is_wanted: bool) -> Tensor:
        assert self.cache is not None
        self.cache.append(layer, k, v)
        if not is_wanted:
            return q
        new = range(self.cache.layout.length - q.shape[1], self.cache.layout.length)
        queries = Layout(((new,), *((),) * (self.ring.size - 1)))
        if self.cache.is_evicted(layer):
            parts, carry = self.cache.parts(layer, attention), None if attention.carry is None else self.cache.carry(layer)
            out, lse = decode_explicit(q, parts, length=new.stop, ring=self.ring, attention=attention, carry=carry)
            if carry is not None:
                self.cache.carry_on(layer, carry)
        else:
            out, lse = self._decode_all(layer, q, attention, queries)
        self._evict(layer, q, lse, torch.arange(new.start, new.stop, device=q.device), attention, queries)
        return out

    def _decode_all(self, layer: int, q: Tensor, attention: Attention, queries: Layout) -> tuple[Tensor, Tensor]:
        """Decode where no key was evicted."""
        assert self.cache is not None
        (new,) = queries.spans[0]
        key_layout, spans = self._wanted(attention, q.shape[2], queries)
        if key_layout.length < new.stop:  # the newest key is not seen by itself, but decoding counts queries back from it
            key_layout, spans = self.cache.layout, ((0, self.cache.layout.count(self.ring.rank)),)
        keys, values = self.cache.read(layer, spans)
        rotated = self.cache.encoded(layer, attention, spans)
        if rotated is not None and attention.encoding is not None:
            q, keys = attention.encoding.queries(q, torch.arange(new.start, new.stop, device=q.device)), rotated
            attention = replace(attention, encoding=None)
        carry = None if attention.carry is None else self.cache.carry(layer, spans)
        found = decode_with_lse(q, keys, values, key_layout=key_layout, ring=self.ring, attention=attention, carry=carry)
        if carry is not None:
            self.cache.carry_on(layer, carry, spans)
        return found

    def _wanted(self, attention: Attention, num_heads: int, queries: Layout) -> tuple[Layout, Spans]:
        """Of the cached keys those that these queries see: where they live, and this rank's positions. A window leaves most alone."""
        assert self.cache is not None
        key_layout, spans = wanted(attention.patterns(num_heads), queries, self.cache.layout)
        return key_layout, spans[self.ring.rank]

    def _layout_of(self, num_tokens: int) -> Layout:
        """This call's layout. A rank that owns no token is fed one all the same, because transformers takes no empty input."""
        layout = self.layout
        if self.only_running and not self.is_running:
            raise ConfigError(
                "A layer was computed outside the model's forward, as by activation checkpointing that is not the model's own, "
                "and then nobody says where tokens live; call model.gradient_checkpointing_enable() after join, or leave it out."
            )
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

        Raises LayoutError, saying what to pass. Not looked at inside a compiled model, whose numbers Python never sees.
        """
        if self.decoding or torch.compiler.is_compiling():
            return
        layout = self._layout_of(position_ids.shape[-1])
        indices = layout.indices(self.ring.rank, position_ids.device)
        if len(indices) and not bool((position_ids == indices).all()):
            raise LayoutError(
                f"Rank {self.ring.rank} was given position ids {_ends(position_ids.flatten())}, "
                f"but its tokens' indices are {_ends(indices)}. "
                "Pass position_ids=layout.indices(ring.rank)[None]; packed documents need no restart, since rotation is relative."
            )


def _now() -> float:
    """Seconds on a clock; it stands still while a graph is traced."""
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()


class Watched:
    """A selector that remembers what it chose, and passes for the one inside."""

    def __init__(self, selector: Selector) -> None:
        self.selector, self.prefill, self.decode, self.trains = selector, selector.prefill, selector.decode, selector.trains
        self.chosen: Pattern | None = None

    def select(self, q: Tensor, k: Tensor, sight: Sight) -> Pattern:
        """What the selector inside chooses."""
        self.chosen = self.selector.select(q, k, sight)
        return self.chosen

    def __repr__(self) -> str:
        return repr(self.selector)


def _ends(numbers: Tensor) -> str:
    """The first few and the last of some numbers, for a message."""
    few = ", ".join(str(n) for n in numbers[:4].tolist())
    return few if len(numbers) <= 4 else f"{few}, … {int(numbers[-1])}"
