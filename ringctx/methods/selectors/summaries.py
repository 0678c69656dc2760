"""Summaries: what selectors tell each other about the tokens of a block, or of a few queries, instead of the tokens.

Knows layouts, rings and tensors. Knows nothing of what is selected. Sums are in float64, and what is compared is rounded to
float32, so that a sum taken in another order, on another number of ranks, decides alike.
Letters: s or n tokens here, h heads, g key heads, d width, N indices of the whole sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringctx.core.gathered import gathered
from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.listed import Blocks
from ringctx.core.ring import Message, Ring
from ringctx.core.rules import at_least
from ringctx.core.select import Sight

KIND = "selection"
"""How the traffic counters call it all."""


def at_least_one(name: str, **values: int) -> None:
    """Raise ConfigError for a size below 1."""
    for key, value in values.items():
        at_least(1, f"{name}({key}=...)", value, "it counts tokens or blocks")


def num_blocks(length: int, block: int) -> int:
    """Blocks that cover so many indices."""
    return -(-length // block)


def block_sums(ring: Ring, x: Tensor, layout: Layout, block: int, length: int) -> tuple[Tensor, Tensor]:
    """The sum over each block's tokens on all ranks, float64 (blocks, h, d), and how many they are, (blocks,); the same everywhere.

    Each rank sends one row for each block that it has a token of. Differentiable.
    """
    places = [torch.unique(layout.indices(r) // block, return_inverse=True, return_counts=True) for r in range(ring.size)]
    touched, inverse, _ = places[ring.rank]
    mine = x.new_zeros(len(touched), *x.shape[1:], dtype=torch.float64).index_add(0, inverse.to(x.device), x.double())
    sums = gathered(ring, mine, KIND, [len(blocks) for blocks, _, _ in places])
    at, many = (torch.cat([place[n] for place in places]) for n in (0, 2))
    total = sums.new_zeros(num_blocks(length, block), *x.shape[1:]).index_add(0, at.to(x.device), sums)
    counts = torch.zeros(len(total), dtype=torch.float64).index_add(0, at, many.double())
    return total, counts.to(x.device)


def block_means(ring: Ring, x: Tensor, layout: Layout, block: int, length: int) -> tuple[Tensor, Tensor]:
    """The mean of each block's tokens, float64 (blocks, h, d), 0 where there are none, and how many they are."""
    total, counts = block_sums(ring, x, layout, block, length)
    return total / counts.clamp(min=1)[:, None, None], counts


def block_bounds(ring: Ring, x: Tensor, layout: Layout, block: int, length: int) -> Tensor:
    """The greatest number of each channel in each block, (blocks, h, d) in x's dtype; -inf where a block has no token."""
    places = [torch.unique(layout.indices(r) // block, return_inverse=True) for r in range(ring.size)]
    touched, inverse = places[ring.rank]
    mine = x.new_full((len(touched), *x.shape[1:]), -torch.inf)
    mine.scatter_reduce_(0, inverse.to(x.device)[:, None, None].expand_as(x), x, "amax")
    total = x.new_full((num_blocks(length, block), *x.shape[1:]), -torch.inf)
    for (blocks, _), part in zip(places, share(ring, mine, KIND, [len(blocks) for blocks, _ in places]), strict=True):
        blocks = blocks.to(x.device)
        total[blocks] = torch.maximum(total[blocks], part)
    return total


def collect(ring: Ring, x: Tensor, layout: Layout, indices: Tensor) -> Tensor:
    """The rows of these ascending indices, from whichever rank has them, on every rank; 0 where none has. x (s ...) -> (len ...)."""
    found = [torch.isin(layout.indices(r), indices).nonzero()[:, 0] for r in range(ring.size)]
    parts = share(ring, x[found[ring.rank].to(x.device)], KIND, [len(f) for f in found])
    whole = x.new_zeros(len(indices), *x.shape[1:])
    for rank, part in enumerate(parts):
        whole[torch.searchsorted(indices, layout.indices(rank)[found[rank]]).to(x.device)] = part
    return whole


def regroup(ring: Ring, x: Tensor, source: Layout, target: Layout) -> Tensor:
    """Tokens that live as `source` says -> this rank's tokens of `target`, (t ...), in its order; 0 where no rank has one."""
    indices = [source.indices(r) for r in range(ring.size)]

    def common(sender: int, receiver: int) -> Tensor:
        """Places in the sender's order of what the receiver wants."""
        return torch.isin(indices[sender], target.indices(receiver)).nonzero()[:, 0]

    others = [(ring.rank + n) % ring.size for n in range(1, ring.size)]
    arriving = {r: x.new_empty(len(common(r, ring.rank)), *x.shape[1:]) for r in others}
    send = [Message(r, (x[common(ring.rank, r).to(x.device)],)) for r in others]
    ring.exchange(KIND, "tokens of whole blocks", [Message(r, (t,)) for r, t in arriving.items()], send).wait()
    arriving[ring.rank] = x[common(ring.rank, ring.rank).to(x.device)]
    wanted, order = target.indices(ring.rank).sort()
    mine = x.new_zeros(len(wanted), *x.shape[1:])
    for sender, part in arriving.items():
        mine[order[torch.searchsorted(wanted, indices[sender][common(sender, ring.rank)])].to(x.device)] = part
    return mine


TILT = 2**-0.5
"""By which float64 scores are multiplied before they are rounded: keys that are alike often give numbers halfway between two of float32,
where the last bit of a sum would decide. Times an irrational number, numbers like that lie nowhere special."""


def largest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of the last dim, equal ones from the lower index on; never at -inf. NaN counts as largest."""
    rounded = (scores * TILT).float() if scores.dtype == torch.float64 else scores.float()
    order = rounded.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) & ~scores.isneginf()


def within_share(weights: Tensor, share_of_all: float) -> Tensor:
    """How many of the largest weights of the last dim together stay within this share; weights are >= 0."""
    mass = weights.sort(dim=-1, descending=True, stable=True).values.cumsum(-1)
    return (mass.float() <= share_of_all).sum(-1)


def shared_bits(ring: Ring, mine: Tensor, rows: list[int]) -> list[Tensor]:
    """Every rank's bool (rows, h, n), sent as bits."""
    width = mine.shape[-1]
    eights = pad(mine, (0, -width % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    powers = torch.arange(8, dtype=torch.uint8, device=mine.device)
    packed = (eights << powers).sum(-1, dtype=torch.uint8)
    everyone = share(ring, packed, KIND, rows)
    return [((part.unsqueeze(-1) >> powers.to(part.device)) & 1).bool().flatten(-2)[..., :width] for part in everyone]


def tiles_seen(mask: Tensor, size: tuple[int, int], before: int = 0) -> Blocks:
    """The pattern of a bool (h, rows, columns) of tiles, after `before` empty rows; one mask where all heads are alike."""
    alike = len(mask) > 1 and bool((mask == mask[:1]).all())
    found = Blocks.of(mask[:1] if alike else mask, size)
    return Blocks(tuple((0,) * before + rows for rows in found.masks), found.columns, found.size) if before else found


def rows_seen(mask: Tensor, first: int, length: int, block: int) -> Blocks:
    """The pattern of a bool (h, t, blocks): key blocks that each of t queries sees, which begin at index `first`; one serves all."""
    return tiles_seen(mask, (length, block)) if mask.shape[1] == 1 else tiles_seen(mask, (1, block), first)


def chosen(sight: Sight, mine: Tensor, block: int) -> Blocks:
    """The pattern, on every rank, of the key blocks that each rank's queries chose: bool (s, h, blocks), which travels as bits.

    While decoding all ranks have all queries, and have chosen alike.
    """
    if sight.decoding:
        return rows_seen(mine.transpose(0, 1), int(sight.layout.indices(0)[0]), sight.length, block)
    every = [sight.layout.indices(r) for r in range(sight.ring.size)]
    first = int(torch.cat(every).min())
    mask = torch.zeros(mine.shape[1], sight.layout.length - first, mine.shape[2], dtype=torch.bool, device=mine.device)
    for indices, part in zip(every, shared_bits(sight.ring, mine, [len(x) for x in every]), strict=True):
        mask[:, (indices - first).to(mine.device)] = part.transpose(0, 1).to(mine.device)
    return rows_seen(mask, first, sight.length, block)
