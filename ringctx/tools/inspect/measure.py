"""Measure: the document is read once, and each layer's attention is measured on some of its rows as the layer computes it.

All keys are looked at; rows are spread evenly over the document. What a selector keeps is measured on the same rows, which attend to
all keys in the model all the same. Letters: s rows of this rank, h query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ringctx.asked.selecting import KINDS, selector_of
from ringctx.config import Config, parse
from ringctx.core.attention import Attention
from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.core.rows import Rows, measure_rows
from ringctx.core.select import Selector, narrowed, sight_of
from ringctx.errors import ConfigError
from ringctx.runtime.engine import Engine
from ringctx.runtime.tokenise import tokenise

MEASURES = ("entropy", "relative_entropy", "effective_count", "hoyer", "largest", "first")
SELECTORS = tuple(kind for kind, selector in KINDS.items() if selector.prefill)
"""Selectors that look at a text while it is read."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """text: the document. tokens: how many of it are read, None for all. rows: how many are measured. first: keys that count as first.

    selectors: by the names that they are reported under.
    """

    text: str
    tokens: int | None = None
    rows: int = 512
    first: int = 4
    selectors: dict[str, Selector] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Head:
    """Means over the rows of a head. entropy in nats, and relative to that of equal weights; effective_count: 1 / sum p^2, in keys;
    hoyer: 0 for equal weights to 1; largest: the greatest weight; first: the weight on the first keys.

    distance: the weight in each bin of distances. selectors: of each, the weight of the keys that it keeps, and the share of keys kept.
    """

    layer: int
    head: int
    entropy: float
    relative_entropy: float
    effective_count: float
    hoyer: float
    largest: float
    first: float
    distance: list[float]
    selectors: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """tokens that were read, on so many ranks; rows that were measured; edges: the distances at which bins begin, 0 the key itself."""

    tokens: int
    ranks: int
    rows: int
    edges: list[int]
    heads: list[Head]

    def json(self) -> dict[str, Any]:
        """As plain lists and mappings."""
        return asdict(self)


def selectors_of(written: Sequence[str]) -> dict[str, Selector]:
    """Selectors by what was written: a kind, or a block as in attention.select; all kinds for nothing, none for `none`.

    Raises ConfigError for what does not select while a text is read.
    """
    found = {}
    for text in written or SELECTORS:
        if text != "none":
            block = parse(f"attention: {{select: {text if text.startswith('{') else f'{{kind: {text}}}'}}}").attention
            selector = None if isinstance(block, tuple) else selector_of(block.select)
            if selector is None or not selector.prefill:
                raise ConfigError(f"--selector {text} does not select while a text is read; there are {', '.join(SELECTORS)}.")
            found[text.strip("{}")] = selector
    return found


def check(config: Config, asked: Asked) -> None:
    """Raise ConfigError for what cannot be measured."""
    if asked.rows < 1 or (asked.tokens is not None and asked.tokens < 2):
        raise ConfigError(f"--rows is {asked.rows} and --tokens {asked.tokens}; measure a row or more of two tokens or more.")
    for is_set, name, instead in (
        (config.selects, "attention.select narrows what is measured", "attention.select={}"),
        (config.cache.evict.kind != "none", "cache.evict drops keys", "cache.evict={}"),
        (config.model.tensor_parallel > 1, "model.tensor_parallel spreads heads over ranks", "model.tensor_parallel=1"),
        (config.carries, "attention.carry takes from logits what rows do not know", "attention.carry={}"),
    ):
        if is_set:
            raise ConfigError(f"`ringctx inspect` measures every key of every head, but {name}; add --set '{instead}'.")


def measure(config: Config, ring: Ring, asked: Asked, after_layer: Callable[[int, int], None] | None = None) -> Result:
    """Read the document and measure it. All ranks call it together and return the same. after_layer: told of each, of how many."""
    check(config, asked)
    engine = Engine.load(config, ring)
    ids = torch.tensor(tokenise(engine.tokenizer, asked.text))[: asked.tokens]
    if len(ids) < 2:
        raise ConfigError(f"The document has {len(ids)} tokens; give one of two or more.")
    engine.extend(len(ids))
    layout = Layout.zigzag(len(ids), ring.size)
    spied, context = _Spy(asked, layout, ring, len(ids)), engine.context
    context.asked = spied
    if after_layer is not None:
        context.after_layer = lambda layer: after_layer(layer, engine.num_layers)
    try:
        with torch.no_grad(), context.running(layout):
            engine.model.base_model(**engine.inputs(ids, layout)[1], use_cache=False)
    finally:
        context.asked = context.after_layer = None
    return Result(tokens=len(ids), ranks=ring.size, rows=len(spied.rows), edges=[0, *spied.edges], heads=spied.heads())


class _Spy:
    """Hears what each layer attends, and adds up its measures over this rank's rows."""

    def __init__(self, asked: Asked, layout: Layout, ring: Ring, length: int) -> None:
        self.asked, self.layout, self.ring = asked, layout, ring
        self.rows = torch.linspace(1, length - 1, min(asked.rows, length - 1)).round().long().unique()
        self.edges = tuple(2**n for n in range((length - 1).bit_length()))
        self.at = torch.isin(layout.indices(ring.rank), self.rows).nonzero()[:, 0]
        self.sums: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, attention: Attention) -> None:
        """q (1 s h d), k (1 n g d) of this rank, not encoded."""
        count = self.layout.count(self.ring.rank)
        q, k = q[:, :count], k[:, :count]
        rows = self._rows(q, k, attention)
        told = [getattr(rows, name) if name != "relative_entropy" else _relative(rows) for name in MEASURES]
        for selector in self.asked.selectors.values():
            kept = self._kept(q, k, replace(attention, select=selector))
            told += [(kept.lse - rows.lse).exp(), kept.seen / rows.seen]
        columns = torch.cat((torch.stack(told, -1), rows.distance), -1)[0]  # (s h measures)
        self.sums[layer] = columns.double().sum(0).cpu()

    def _rows(self, q: Tensor, k: Tensor, attention: Attention) -> Rows:
        i = self.layout.indices(self.ring.rank, q.device)[self.at]
        asked: dict[str, Any] = {"layout": self.layout, "ring": self.ring, "edges": self.edges, "first": self.asked.first}
        return measure_rows(q[:, self.at], k, i=i, attention=attention, **asked)

    def _kept(self, q: Tensor, k: Tensor, attention: Attention) -> Rows:
        """The same rows over the keys that a selector keeps."""
        indices = self.layout.indices(self.ring.rank, q.device)
        if attention.encoding is not None:
            q, k = attention.encoding.queries(q, indices), attention.encoding.keys(k, indices)
        sight = sight_of(self.ring, self.layout, self.layout, attention, q.shape[3])
        return self._rows(q, k, narrowed(q, k, sight, attention))

    def heads(self) -> list[Head]:
        """The means over all ranks' rows."""
        mine = torch.stack([self.sums[layer] for layer in sorted(self.sums)])  # (layers h measures)
        means = torch.stack(share(self.ring, mine, "measures") if self.ring.size > 1 else [mine]).sum(0) / len(self.rows)
        found, kinds = [], list(self.asked.selectors)
        for layer, of_layer in zip(sorted(self.sums), means.tolist(), strict=True):
            for head, row in enumerate(of_layer):
                told, rest = row[: len(MEASURES)], row[len(MEASURES) :]
                pairs = {kind: {"retained": rest[2 * n], "density": rest[2 * n + 1]} for n, kind in enumerate(kinds)}
                measures = dict(zip(MEASURES, told, strict=True))
                found.append(Head(layer=layer, head=head, distance=rest[2 * len(kinds) :], selectors=pairs, **measures))
        return found


def _relative(rows: Rows) -> Tensor:
    """Entropy over that of equal weights on the keys that are seen; 0 where that is one key."""
    most = rows.seen.to(rows.entropy.dtype).log()
    return torch.where(rows.seen > 1, rows.entropy / most.clamp(min=1e-9), 0.0)
