"""The stock patterns that are lists: documents, and tiles one by one. They hold tuples of integers, never tensors.

Knows indices. The functions that make them are in `ringctx.patterns`; those that are rules are in `ringctx.core.rules`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ringctx.core.pattern import CAUSAL, EMPTY, FULL, PARTIAL, HeadGroups, Pattern, Verdict, group_heads, nearest_cut, shared_verdict
from ringctx.core.rules import at_least, some
from ringctx.errors import ConfigError, LayoutError


def hash_once(self: Any) -> int:
    """A hash for patterns with much content, taken the first time only."""
    if "_hash" not in self.__dict__:
        self.__dict__["_hash"] = hash(tuple(getattr(self, field.name) for field in fields(self)))
    return int(self.__dict__["_hash"])


@dataclass(frozen=True)
class Runs:
    """The documents of one row of the batch: run n begins at starts[n] and belongs to document ids[n].

    Neighbours differ, and documents are numbered as they first appear, so that equal rows have equal runs.
    """

    starts: tuple[int, ...]
    ids: tuple[int, ...]

    @cached_property
    def _never_return(self) -> bool:
        return len(set(self.ids)) == len(self.ids)

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.starts), torch.tensor(self.ids)

    def documents(self, index: Tensor) -> Tensor:
        starts, ids = (x.to(index.device) for x in self._tensors)
        return ids[torch.searchsorted(starts, index, right=True) - 1]

    def judge(self, q: range, k: range) -> Verdict:
        (q_first, q_last), (k_first, k_last) = self._touched(q), self._touched(k)
        if q_first == q_last and k_first == k_last:
            return FULL if self.ids[q_first] == self.ids[k_first] else EMPTY
        if q_first <= k_last and k_first <= q_last:
            return PARTIAL
        apart = self._never_return or set(self.ids[q_first : q_last + 1]).isdisjoint(self.ids[k_first : k_last + 1])
        return EMPTY if apart else PARTIAL

    def _touched(self, span: range) -> tuple[int, int]:
        return bisect_right(self.starts, span[0]) - 1, bisect_right(self.starts, span[-1]) - 1

    def near_the_middle(self, span: range) -> Iterator[int]:
        after = bisect_right(self.starts, (span[0] + span[-1] + 1) // 2)
        yield from self.starts[max(after - 1, 0) : after + 1]


@dataclass(frozen=True)
class Documents(Pattern):
    """i and j in the same document; one row of runs for all, or one for each row of the batch."""

    length: int
    rows: tuple[Runs, ...]
    __hash__ = hash_once

    @classmethod
    def from_borders(cls, borders: Tensor) -> Documents:
        if borders.dim() != 1 or borders[0] != 0 or borders[-1] < 1 or bool((borders.diff() < 0).any()):
            raise ConfigError(
                f"cu_seqlens rises from 0 to the number of tokens, and {some(borders.flatten().tolist())} does not; "
                "write 0 5 9 for documents of 5 and 4 tokens."
            )
        *starts, length = borders.unique_consecutive().tolist()
        return cls(length, (Runs(tuple(starts), tuple(range(len(starts)))),))

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        if ids.dim() not in (1, 2):
            raise ConfigError(f"ids are (S) or (b, S), and these have shape {tuple(ids.shape)}; give each token of each row one id.")
        rows = []
        for row in ids.reshape(-1, ids.shape[-1]):
            values, counts = row.unique_consecutive(return_counts=True)
            numbers: dict[int, int] = {}
            numbered = tuple(numbers.setdefault(value, len(numbers)) for value in values.tolist())
            rows.append(Runs(tuple((counts.cumsum(0) - counts).tolist()), numbered))
        return cls(ids.shape[-1], tuple(rows))

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        _within(self, self.length, i, j)
        same = torch.stack([row.documents(i)[:, None] == row.documents(j) for row in self.rows])
        return same[:, None] if self.batch() else same[0]

    def judge(self, q: range, k: range) -> Verdict:
        _within(self, self.length, q, k)
        return shared_verdict(row.judge(q, k) for row in self.rows)

    def cut(self, span: range) -> int | None:
        return nearest_cut(span, (start for row in self.rows for start in row.near_the_middle(span)))

    def batch(self) -> int | None:
        return len(self.rows) if len(self.rows) > 1 else None

    def __str__(self) -> str:
        if self.batch():
            return f"documents({len(self.rows)} rows of {self.length} tokens)"
        return f"documents({some((*self.rows[0].starts, self.length))})"


@dataclass(frozen=True)
class Blocks(Pattern):
    """Tile (i // size[0], j // size[1]) is marked: bit n of masks[head][m] is tile (m, n). One mask serves all heads."""

    masks: tuple[tuple[int, ...], ...]
    columns: int
    size: tuple[int, int]
    __hash__ = hash_once

    @classmethod
    def of(cls, tiles: Tensor, size: int | tuple[int, int]) -> Blocks:
        if tiles.dtype != torch.bool or tiles.dim() not in (2, 3) or not tiles.numel():
            raise ConfigError(
                f"blocks takes a bool mask (nq, nk) or (h, nq, nk), and this is {tiles.dtype} {tuple(tiles.shape)}; "
                "mark the tiles to be seen with True."
            )
        edges = tuple(size) if isinstance(size, tuple | list) else (size, size)
        if len(edges) != 2:
            raise ConfigError(f"blocks takes one size or two, (queries, keys), and was given {size!r}; write blocks(mask, (64, 128)).")
        for edge in edges:
            at_least(1, "blocks", edge, "its size is the number of tokens along a tile's edge")
        columns = tiles.shape[-1]
        bits = torch.nn.functional.pad(tiles.cpu(), (0, -columns % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
        packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        heads = packed.tolist() if packed.dim() == 3 else [packed.tolist()]
        masks = tuple(tuple(int.from_bytes(bytes(row), "little") for row in head) for head in heads)
        return cls(masks, columns, (edges[0], edges[1]))

    def allows(self, i: Tensor, j: Tensor) -> Tensor:
        self._covers(i, j)
        if len(i) and len(j):
            rows, columns = i // self.size[0], j // self.size[1]
            first_row, first_column = int(rows.min()), int(columns.min())
            tiles = self._unpack(range(first_row, int(rows.max()) + 1), range(first_column, int(columns.max()) + 1))
            seen = tiles.to(i.device)[:, rows - first_row][:, :, columns - first_column]
        else:
            seen = torch.zeros(len(self.masks), len(i), len(j), dtype=torch.bool, device=i.device)
        return seen[0] if len(seen) == 1 else seen

    def _unpack(self, rows: range, columns: range) -> Tensor:
        """The tiles of these rows and columns, bool (h, rows, columns)."""
        width = -(-len(columns) // 8)
        cut = b"".join(bits.to_bytes(width, "little") for mask in self.masks for bits in _cut(mask, rows, columns))
        packed = torch.frombuffer(bytearray(cut), dtype=torch.uint8).view(len(self.masks), len(rows), width, 1)
        return ((packed >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten(-2)[..., : len(columns)]

    def judge(self, q: range, k: range) -> Verdict:
        self._covers(q, k)
        rows = range(q[0] // self.size[0], q[-1] // self.size[0] + 1)
        columns = range(k[0] // self.size[1], k[-1] // self.size[1] + 1)
        a_tile_each = len(q) == len(rows) == len(columns) == len(k)
        return shared_verdict(self._judge(_cut(mask, rows, columns), len(columns), a_tile_each) for mask in self.masks)

    @staticmethod
    def _judge(seen: list[int], width: int, a_tile_each: bool) -> Verdict:
        if not any(seen):
            return EMPTY
        if all(bits == (1 << width) - 1 for bits in seen):
            return FULL
        return CAUSAL if a_tile_each and all(bits == (2 << n) - 1 for n, bits in enumerate(seen)) else PARTIAL

    def cut(self, span: range) -> int | None:
        middle = (span[0] + span[-1] + 1) // 2
        return nearest_cut(span, (edge for size in self.size for edge in (middle // size * size, (middle // size + 1) * size)))

    def heads(self, num_heads: int) -> HeadGroups:
        if len(self.masks) == 1:
            return super().heads(num_heads)
        if len(self.masks) != num_heads:
            raise ConfigError(f"{self} has a mask for each of {len(self.masks)} heads and the queries have {num_heads}; give one for each.")
        return group_heads(([head], Blocks((mask,), self.columns, self.size)) for head, mask in enumerate(self.masks))

    def _covers(self, q: range | Tensor, k: range | Tensor) -> None:
        _within(self, len(self.masks[0]) * self.size[0], q)
        _within(self, self.columns * self.size[1], k)

    def __repr__(self) -> str:
        rows = "; ".join(" ".join(f"{bits:x}" for bits in mask) for mask in self.masks)  # decimals of long rows are refused by Python
        return f"Blocks(masks={rows}, columns={self.columns}, size={self.size})"

    def __str__(self) -> str:
        heads = f"{len(self.masks)} heads, " if len(self.masks) > 1 else ""
        return f"blocks({heads}{len(self.masks[0])} x {self.columns} tiles of {self.size[0]} x {self.size[1]})"


def _cut(mask: tuple[int, ...], rows: range, columns: range) -> list[int]:
    """These rows of a mask of bits, reduced to these columns; the first column becomes bit 0."""
    ones = (1 << len(columns)) - 1
    return [(bits >> columns.start) & ones for bits in mask[rows.start : rows.stop]]


def _within(pattern: Pattern, length: int, *indices: range | Tensor) -> None:
    last = max((int(index[-1] if isinstance(index, range) else index.max()) for index in indices if len(index)), default=-1)
    if last >= length:
        raise LayoutError(
            f"{pattern} says who sees whom up to index {length - 1}, and index {last} was asked; build it for the whole sequence."
        )
