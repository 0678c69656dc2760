"""KVCache: this rank's keys and values of every layer, in pages, and who writes the next token.

Knows tokens, indices and ranks. Knows nothing of the model, and sends nothing.
Letters: b batch, n cached tokens on this rank, g key heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.tiles import Spans
from ringctx.errors import ConfigError, LayoutError

PAGE = 64
"""Tokens a page: memory grows by it, and a new page goes to the next rank."""


class Store:
    """A tensor (b n g d) that grows in pages along n."""

    def __init__(self, page: int) -> None:
        self.page, self.count = page, 0
        self._data: Tensor | None = None

    @property
    def data(self) -> Tensor:
        """What was written, (b n g d); a view, not to be written to."""
        if self._data is None:
            raise LayoutError("This layer's cache was never written; run the prefill first.")
        return self._data[:, : self.count]

    def write(self, x: Tensor, room: int) -> None:
        """Append x (b n g d); when memory must grow, grow for `room` tokens in all."""
        needed = self.count + x.shape[1]
        if self._data is None or needed > self._data.shape[1]:
            capacity = -(-max(needed, room) // self.page) * self.page
            grown = x.new_empty(x.shape[0], capacity, *x.shape[2:])
            if self._data is not None:
                grown[:, : self.count] = self.data
            self._data = grown
        self._data[:, self.count : needed] = x
        self.count = needed

    @property
    def bytes(self) -> int:
        """Memory held."""
        return 0 if self._data is None else self._data.numel() * self._data.element_size()


def _at(x: Tensor, spans: Spans) -> Tensor:
    """The tokens of x (b n g d) at these positions; a view where they are one run."""
    parts = [x[:, a:b] for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else x[:, :0]


@dataclass
class _LayerCache:
    keys: Store
    values: Store
    rotated: Store


@dataclass
class KVCache:
    """Keys before rotation, values and indices of this rank.

    Prefill: `extend(layout)`, then each layer appends its shard. Decode: `grow(n)`, then each layer appends the n tokens
    that every rank computed, and the owner keeps them. New tokens go to the ranks in turn, a page at a time.
    keep_rotated: hold a rotated copy of the keys too, so that decoding does not rotate them all for every token.
    room: tokens of memory on this rank to set aside when the first are written.
    """

    num_layers: int
    rank: int
    size: int
    page: int = PAGE
    keep_rotated: bool = True
    room: int = 0
    _layout: Layout = field(init=False)
    _keep: slice = field(init=False, default_factory=lambda: slice(0, 0))
    _grown: int = field(init=False, default=0)
    _layers: list[_LayerCache] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ConfigError(f"cache.page is {self.page}; a page holds at least 1 token.")
        self._layout = Layout(((),) * self.size)
        self._layers = [_LayerCache(Store(self.page), Store(self.page), Store(self.page)) for _ in range(self.num_layers)]

    @property
    def layout(self) -> Layout:
        """Where the cached keys live, this call's tokens included."""
        return self._layout

    @property
    def bytes(self) -> int:
        """Memory held by all layers."""
        return sum(store.bytes for layer in self._layers for store in (layer.keys, layer.values, layer.rotated))

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
        keys, values = cache.keys.data, cache.values.data
        return (keys, values) if spans is None else (_at(keys, spans), _at(values, spans))

    def encoded(self, layer: int, attention: Attention) -> Tensor | None:
        """This rank's keys, rotated, (b n g d); only the new ones are computed. None when not kept or nothing rotates."""
        if not self.keep_rotated or attention.encoding is None or attention.branches:
            return None
        cache = self._layers[layer]
        keys, done = cache.keys.data, cache.rotated.count
        if done < keys.shape[1] or cache.rotated._data is None:
            indices = self._layout.indices(self.rank, keys.device)[done:]
            cache.rotated.write(attention.encoding.keys(keys[:, done:], indices), max(self.room, keys.shape[1]))
        return cache.rotated.data
