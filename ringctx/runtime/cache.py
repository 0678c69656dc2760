"""KVCache: this rank's keys and values of every layer, in pages, and who writes the next token.

Knows tokens, indices and ranks. Knows nothing of the model, and sends nothing.
Letters: b batch, n cached tokens on this rank, g key heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.layout import Layout, Ranges, indices_of, ranges_of
from ringctx.core.tiles import Spans
from ringctx.errors import ConfigError, LayoutError
from ringctx.runtime.storage import Mark, Store, open_store

PAGE = 64
"""Tokens a page: memory grows by it, and a new page goes to the next rank."""


def _read(store: Store, spans: Spans | None) -> Tensor:
    """The tokens (b n g d) at these positions, all by default; a view where the store allows it and they are one run."""
    if spans is None or not spans:
        return store.data if spans is None else store.read(0, 0)
    parts = [store.read(a, b) for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass
class _LayerCache:
    keys: Store
    values: Store
    rotated: Store | None

    @property
    def stores(self) -> list[Store]:
        """All that there are."""
        return [store for store in (self.keys, self.values, self.rotated) if store is not None]


@dataclass(frozen=True)
class CacheMark:
    """Where a cache stood: the layout of its keys, the tokens it had grown by, and each layer's keys and values."""

    layout: Layout
    grown: int
    stores: tuple[tuple[Mark, Mark], ...]


@dataclass
class KVCache:
    """Keys before rotation, values and indices of this rank.

    Prefill: `extend(layout)`, then each layer appends its shard. Decode: `grow(n)`, then each layer appends the n tokens
    that every rank computed, and the owner keeps them. New tokens go to the ranks in turn, a page at a time.
    keep_rotated: hold a rotated copy of the keys too, so that decoding does not rotate them all for every token. Only where
    storage is "model": beside smaller keys, a copy in full would take back what they save.
    room: tokens of memory on this rank to set aside when the first are written.
    storage: how keys and values are held, one of storage.KINDS. spill: the folder of the files that hold them instead of memory.
    """

    num_layers: int
    rank: int
    size: int
    page: int = PAGE
    keep_rotated: bool = True
    room: int = 0
    storage: str = "model"
    spill: Path | None = None
    _layout: Layout = field(init=False)
    _keep: slice = field(init=False, default_factory=lambda: slice(0, 0))
    _grown: int = field(init=False, default=0)
    _layers: list[_LayerCache] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ConfigError(f"cache.page is {self.page}; a page holds at least 1 token.")
        self._layout = Layout(((),) * self.size)
        self._layers = [self._layer() for _ in range(self.num_layers)]

    def _layer(self) -> _LayerCache:
        keys, values = (open_store(self.storage, page=self.page, per_channel=keys, spill=self.spill) for keys in (True, False))
        is_kept = self.keep_rotated and self.storage == "model"
        return _LayerCache(keys, values, open_store("model", page=self.page, per_channel=True, spill=self.spill) if is_kept else None)

    @property
    def layout(self) -> Layout:
        """Where the cached keys live, this call's tokens included."""
        return self._layout

    @property
    def bytes(self) -> int:
        """Memory held by all layers, files left out."""
        return sum(store.bytes for layer in self._layers for store in layer.stores)

    @property
    def mapped_bytes(self) -> int:
        """Length of all layers' files."""
        return sum(store.mapped_bytes for layer in self._layers for store in layer.stores)

    def extend(self, layout: Layout) -> None:
        """Tokens of this layout come next, each rank appending its own. Raises LayoutError when an index is cached already."""
        spans = (old + new for old, new in zip(self._layout.spans, layout.spans, strict=True))
        self._layout = Layout(tuple(spans))
        self._keep = slice(0, layout.count(self.rank))

    def grow(self, num_tokens: int = 1) -> None:
        """The next tokens of the sequence come, computed by every rank; each is kept by its owner alone."""
        spans = list(self._layout.spans)
        begin, mine = self._layout.length, []
        for n in range(num_tokens):
            owner = self.next_owner()
            spans[owner] = (*spans[owner], range(begin + n, begin + n + 1))
            self._grown += 1
            if owner == self.rank:
                mine.append(n)
        self._keep = slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)
        if mine and mine != list(range(mine[0], mine[-1] + 1)):
            raise LayoutError(f"{num_tokens} tokens at once go round all {self.size} ranks; grow by at most {self.page} at a time.")
        self._layout = Layout(tuple(spans))

    def next_owner(self) -> int:
        """The rank that keeps the next token."""
        return self._grown // self.page % self.size

    def holding(self, kept: Ranges) -> KVCache:
        """A cache of its own with these tokens, given by ascending index, which are 0, 1, 2, … there; each stays on its rank.

        Keys and values are as they are read here, held as the model computes them.
        """
        places, spans = [], []
        indices = indices_of(kept)
        for rank in range(self.size):
            own = self._layout.indices(rank)
            places.append(torch.isin(own, indices).nonzero()[:, 0])
            spans.append(ranges_of(torch.searchsorted(indices, own[places[rank]])))
        small = KVCache(self.num_layers, self.rank, self.size, self.page, self.keep_rotated, len(places[self.rank]) + 4 * self.page)
        small.extend(Layout(tuple(spans)))
        for number, layer in enumerate(self._layers):
            small.append(number, layer.keys.select(places[self.rank]), layer.values.select(places[self.rank]))
        return small

    def mark(self) -> CacheMark:
        """Where it stands now, for `restore`."""
        return CacheMark(self._layout, self._grown, tuple((layer.keys.mark(), layer.values.mark()) for layer in self._layers))

    def restore(self, mark: CacheMark) -> None:
        """Drop what came after the mark, exactly: another question can be asked of what was read before it."""
        self._layout, self._grown, self._keep = mark.layout, mark.grown, slice(0, 0)
        for layer, (keys, values) in zip(self._layers, mark.stores, strict=True):
            layer.keys.restore(keys)
            layer.values.restore(values)
            if layer.rotated is not None:
                layer.rotated.restore(Mark(min(layer.rotated.count, keys.count), None))

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep what belongs to this rank of this call's k, v (b n g d)."""
        cache = self._layers[layer]
        room = max(self.room, self._layout.count(self.rank))
        cache.keys.write(k[:, self._keep], room)
        cache.values.write(v[:, self._keep], room)

    def read(self, layer: int, spans: Spans | None = None) -> tuple[Tensor, Tensor]:
        """This rank's keys, before rotation, and values (b n g d), in the order of the layout's indices.

        spans: only those at these local positions.
        """
        cache = self._layers[layer]
        return _read(cache.keys, spans), _read(cache.values, spans)

    def encoded(self, layer: int, attention: Attention, spans: Spans | None = None) -> Tensor | None:
        """This rank's keys, rotated, (b n g d), or those at these positions. None when not kept or nothing rotates.

        All that are new are rotated, once.
        """
        cache = self._layers[layer]
        if cache.rotated is None or attention.encoding is None or attention.branches:
            return None
        count, done = cache.keys.count, cache.rotated.count
        if done < count or not cache.rotated.is_written:
            keys = cache.keys.read(done, count)
            indices = self._layout.indices(self.rank, keys.device)[done:]
            cache.rotated.write(attention.encoding.keys(keys, indices), max(self.room, count))
        return _read(cache.rotated, spans)
