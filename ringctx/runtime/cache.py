"""KVCache: this rank's keys and values of every layer, in pages, and who writes the next token.

Knows tokens, indices and ranks. Knows nothing of the model, and sends nothing.
Letters: b batch, n cached tokens on this rank, g key heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.explicit import Keys, encode_at
from ringctx.core.layout import Layout, Ranges, indices_of, ranges_of
from ringctx.core.tiles import Spans
from ringctx.errors import ConfigError, LayoutError, Unsupported
from ringctx.kernels.base import accumulation_dtype
from ringctx.runtime.storage import Mark, Store, open_store

PAGE = 64
"""Tokens a page: memory grows by it, and a new page goes to the next rank."""
EVICTABLE = ("model", "bf16")
"""Kinds of storage whose tokens can be written anew without another rounding."""


def _read(store: Store, spans: Spans | None) -> Tensor:
    """The tokens (b n g d) at these positions, all by default; a view where the store allows it and they are one run."""
    if spans is None or not spans:
        return store.data if spans is None else store.read(0, 0)
    parts = [store.read(a, b) for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclass
class _Part:
    """Some key heads of one layer. Until tokens are evicted there is one part, of all heads (None), in the layout's order.

    indices: (b f n), -1 where a slot is empty; None while the layout says where tokens are. mass: (b f n) or None for zeros.
    carry: (b n') what the first n' keys carry, the others 0; None where they carry nothing.
    """

    keys: Store
    values: Store
    rotated: Store | None
    heads: tuple[int, ...] | None = None
    indices: Tensor | None = None
    mass: Tensor | None = None
    carry: Tensor | None = None

    @property
    def stores(self) -> list[Store]:
        """All that there are."""
        return [store for store in (self.keys, self.values, self.rotated) if store is not None]

    def write(self, k: Tensor, v: Tensor, layout: Layout, rank: int, room: int) -> None:
        """Append k, v (b m g d) of all key heads, the last m of this rank's tokens in the layout."""
        if self.heads is not None:
            k, v = k[:, :, list(self.heads)], v[:, :, list(self.heads)]
        if self.indices is not None:
            room = self.keys.count + k.shape[1]
            new = layout.indices(rank, self.indices.device)[layout.count(rank) - k.shape[1] :].expand(*self.indices.shape[:2], -1)
            self.indices = torch.cat((self.indices, new), -1)
        self.keys.write(k, room)
        self.values.write(v, room)


@dataclass(frozen=True)
class CacheMark:
    """Where a cache stood: the layout of its keys, the tokens it had grown by, and each layer's parts with their stores."""

    layout: Layout
    grown: int
    parts: tuple[tuple[tuple[_Part, Mark, Mark], ...], ...]


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
    _layers: list[list[_Part]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ConfigError(f"cache.page is {self.page}; a page holds at least 1 token.")
        self._layout = Layout(((),) * self.size)
        self._layers = [[self._part()] for _ in range(self.num_layers)]

    def _part(self) -> _Part:
        keys, values = (open_store(self.storage, page=self.page, per_channel=keys, spill=self.spill) for keys in (True, False))
        is_kept = self.keep_rotated and self.storage == "model"
        return _Part(keys, values, open_store("model", page=self.page, per_channel=True, spill=self.spill) if is_kept else None)

    @property
    def layout(self) -> Layout:
        """Where the cached keys live, this call's tokens included."""
        return self._layout

    @property
    def bytes(self) -> int:
        """Memory held by all layers, files left out."""
        return sum(store.bytes for parts in self._layers for part in parts for store in part.stores)

    @property
    def mapped_bytes(self) -> int:
        """Length of all layers' files."""
        return sum(store.mapped_bytes for parts in self._layers for part in parts for store in part.stores)

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
        for number, (part, *others) in enumerate(self._layers):
            assert part.indices is None and not others  # the configuration refuses to evict and to recall
            small.append(number, part.keys.select(places[self.rank]), part.values.select(places[self.rank]))
        return small

    def mark(self) -> CacheMark:
        """Where it stands now, for `restore`. What is evicted afterwards stays in memory while the mark is kept."""
        parts = (tuple((replace(part), part.keys.mark(), part.values.mark()) for part in layer) for layer in self._layers)
        return CacheMark(self._layout, self._grown, tuple(parts))

    def restore(self, mark: CacheMark) -> None:
        """Drop what came after the mark, and take back what was evicted since, exactly: another question can be asked of it."""
        self._layout, self._grown, self._keep = mark.layout, mark.grown, slice(0, 0)
        self._layers = [[replace(part) for part, _, _ in layer] for layer in mark.parts]
        for part, keys, values in (one for layer in mark.parts for one in layer):
            part.keys.restore(keys)
            part.values.restore(values)
            if part.rotated is not None:
                part.rotated.restore(Mark(min(part.rotated.count, keys.count), None))

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep what belongs to this rank of this call's k, v (b n g d)."""
        count = self._layout.count(self.rank)
        k, v = k[:, self._keep], v[:, self._keep]
        for part in self._layers[layer]:
            part.write(k, v, self._layout, self.rank, max(self.room, count))

    def read(self, layer: int, spans: Spans | None = None) -> tuple[Tensor, Tensor]:
        """This rank's keys, before rotation, and values (b n g d), in the order of the layout's indices.

        spans: only those at these local positions. Raises LayoutError when tokens of the layer were evicted; `parts` has the others.
        """
        part = self._whole(layer)
        return _read(part.keys, spans), _read(part.values, spans)

    def encoded(self, layer: int, attention: Attention, spans: Spans | None = None) -> Tensor | None:
        """This rank's keys, rotated, (b n g d), or those at these positions. None when not kept or nothing rotates.

        All that are new are rotated, once.
        """
        rotated = self._rotate(self._whole(layer), attention)
        return None if rotated is None else _read(rotated, spans)

    def carry(self, layer: int, spans: Spans | None = None) -> Tensor:
        """What this rank's keys carry, a copy (b n) in the accumulation dtype; of those at these positions, all by default. New keys: 0.

        After eviction in the order of the only part's slots.
        """
        part = self._layers[layer][0]
        whole = self._padded(part)
        if whole is None:
            like = part.values.read(0, 0)
            whole = like.new_zeros(like.shape[0], part.values.count, dtype=accumulation_dtype(like.dtype))
        return whole if spans is None else torch.cat([whole[:, a:b] for a, b in spans] or [whole[:, :0]], 1)

    def carry_on(self, layer: int, carry: Tensor, spans: Spans | None = None) -> None:
        """Keep what this rank's keys, or those at these positions, carry now: (b n)."""
        if spans is not None:
            whole, at = self.carry(layer), 0
            for a, b in spans:
                whole[:, a:b] = carry[:, at : at + b - a]
                at += b - a
            carry = whole
        self._layers[layer][0].carry = carry

    @property
    def carried(self) -> list[int]:
        """The layers whose keys carry something."""
        return [layer for layer, (part, *_) in enumerate(self._layers) if part.carry is not None]

    def _whole(self, layer: int) -> _Part:
        if self.is_evicted(layer):
            raise LayoutError(f"Tokens of layer {layer} were evicted, so its keys are not those of the layout; ask for its parts.")
        return self._layers[layer][0]

    def _rotate(self, part: _Part, attention: Attention) -> Store | None:
        if part.rotated is None or attention.encoding is None or attention.branches:
            return None
        count, done = part.keys.count, part.rotated.count
        if done < count or not part.rotated.is_written:
            keys = part.keys.read(done, count)
            if part.indices is None:
                turned = attention.encoding.keys(keys, self._layout.indices(self.rank, keys.device)[done:])
            else:
                turned = encode_at(attention.encoding, keys, part.indices[..., done:])
            part.rotated.write(turned, count if part.indices is not None else max(self.room, count))
        return part.rotated

    # -- eviction ---------------------------------------------------------------------------------------------------

    def is_evicted(self, layer: int) -> bool:
        """Whether any rank dropped any key of this layer, so that its keys have indices of their own."""
        return self._layers[layer][0].indices is not None

    def parts(self, layer: int, attention: Attention | None = None) -> list[Keys]:
        """What is held of a layer, at explicit indices; keys before rotation, or rotated by `attention` where a rotated copy is held."""
        found = []
        for part in self._layers[layer]:
            indices, heads = self._at(part)
            rotated = self._rotate(part, attention) if attention is not None else None
            found.append(Keys(heads, (rotated or part.keys).data, part.values.data, indices, rotated is not None))
        return found

    def masses(self, layer: int) -> list[Tensor]:
        """For each part what voters gave its keys, (b f n); 0 where nobody did."""
        found = []
        for part in self._layers[layer]:
            shape = self._at(part)[0].shape
            have = part.values.read(0, 0).new_zeros(*shape[:2], 0, dtype=torch.float64) if part.mass is None else part.mass
            found.append(torch.nn.functional.pad(have, (0, shape[2] - have.shape[2])))
        return found

    def vote(self, layer: int, masses: Sequence[Tensor] | None) -> None:
        """Add these (b f n) to the masses of the layer's parts; None: begin anew at 0."""
        before = self.masses(layer) if masses is not None else []
        for n, part in enumerate(self._layers[layer]):
            part.mass = None if masses is None else before[n] + masses[n]

    def evict(self, layer: int, kept: Sequence[Tensor], groups: Sequence[Sequence[Sequence[int]]]) -> None:
        """Hold on to these keys alone. For each part: kept, bool (b f n), and its heads' places in the groups that go on together.

        A dropped key's slot is empty at once; memory is given back when a page of slots is, or when groups part.
        """
        if self.storage not in EVICTABLE:
            raise Unsupported(
                f"Keys in {self.storage} would be rounded again where others are evicted; use storage {' or '.join(EVICTABLE)}."
            )
        if self._layers[layer][0].carry is not None and [len(some) for some in groups] != [1]:
            raise Unsupported(
                f"Keys of layer {layer} carry what all heads share, so all heads must keep the same; evict by what they carry."
            )
        parts = zip(self._layers[layer], kept, groups, strict=True)
        self._layers[layer] = [self._kept(part, keep, list(places)) for part, keep, some in parts for places in some]

    @staticmethod
    def _padded(part: _Part) -> Tensor | None:
        """What all keys of a part carry, (b n), or None."""
        return None if part.carry is None else torch.nn.functional.pad(part.carry, (0, part.values.count - part.carry.shape[1]))

    def _at(self, part: _Part) -> tuple[Tensor, tuple[int, ...]]:
        """Indices (b f n) of a part's slots, and its heads."""
        like = part.values.read(0, 0)
        heads = part.heads or tuple(range(like.shape[2]))
        if part.indices is not None:
            return part.indices, heads
        return self._layout.indices(self.rank, like.device).expand(like.shape[0], len(heads), -1), heads

    def _kept(self, part: _Part, kept: Tensor, places: list[int]) -> _Part:
        """These heads of a part with these keys alone; the part itself is left as it is."""
        indices, heads = self._at(part)
        kept, indices, heads = kept[:, places], indices[:, places].masked_fill(~kept[:, places], -1), tuple(heads[p] for p in places)
        mass = None if part.mass is None else part.mass[:, places]
        most = int(kept.sum(-1).max()) if kept.numel() else 0
        if len(places) == len(part.heads or places) == part.values.read(0, 0).shape[2] and kept.shape[2] - most < self.page:
            return replace(part, heads=heads, indices=indices, mass=mass, carry=self._padded(part))
        order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]  # (b f most), the kept ones first
        new = replace(self._part(), heads=heads, indices=indices.gather(-1, order))
        new.mass = None if mass is None else mass.gather(-1, order)
        carry = self._padded(part)
        new.carry = None if carry is None else carry.gather(-1, order[:, 0])
        wanted = kept.flatten(0, 1).any(0).nonzero()[:, 0]
        at = torch.searchsorted(wanted, order.contiguous()).clamp(max=max(len(wanted) - 1, 0)).transpose(1, 2).unsqueeze(-1)
        for old, store in ((part.keys, new.keys), (part.values, new.values)):
            x = old.select(wanted)[:, :, places]
            store.write(x.gather(1, at.expand(*at.shape[:3], x.shape[-1])), most)
        return new
