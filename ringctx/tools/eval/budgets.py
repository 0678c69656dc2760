"""Budgets: how well a model predicts held-out sequences when only so many keys are kept, by who chooses them.

Every token is predicted by decoding, many sequences at once, and keys are dropped after each; SnapKV, whose last queries vote
together, reads in chunks of CHUNK tokens and drops after each. A budget is the most keys of a head that a query ever sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ringctx.core.header import share
from ringctx.core.layout import Layout
from ringctx.errors import ConfigError
from ringctx.methods.eviction import H2O, CachePolicy, Forgotten, SnapKV, Streaming, TopK
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.runtime.evict import Evictor
from ringctx.tools.eval.asked import Row
from ringctx.tools.eval.cost import counted
from ringctx.training import variables
from ringctx.training.data import Pairs, data_of
from ringctx.training.labels import IGNORED

SINKS, CHUNK = 4, 16
PROTOCOL = (
    "Held-out sequences of `training`, each token predicted from the keys that are left, and keys dropped after each token (SnapKV: "
    f"after {CHUNK} tokens). budget: the most keys of a head that a query sees, itself included, a number for all layers or one a layer. "
    f"streaming: {SINKS} sinks at most; h2o: half of the keys recent; random: keys drawn by a table of scores. loss: mean of -log p in "
    "nats over the labels that count; exact: the share of them that are the likeliest token."
)
SEARCH = (
    "Greedy search over the budgets of layers (context pruning of arXiv 2410.02703): of all layers the one is cut by `stride` keys "
    "whose cut costs least, until the loss would rise by more than asked. A row a cut. "
) + PROTOCOL


@dataclass(frozen=True, eq=False)
class Random(TopK):
    """Keys drawn once, by index."""

    at_steps: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class BudgetRow(Row):
    """Predictions under one budget. budgets: of each layer, where they differ; keys: their mean. in_reach: of data: variables, the
    share of questions whose value was assigned among the latest so many tokens, which is what a window can know; else None."""

    policy: str
    budgets: list[int]
    keys: float
    loss: float
    exact: float
    in_reach: float | None


def policy_of(name: str, keys: int, length: int) -> CachePolicy | None:
    """Who chooses, so that a query sees `keys` keys at most; None where the method cannot keep so few."""
    match name:
        case "forgotten":
            return Forgotten(keys)
        case "streaming":
            sinks = min(SINKS, keys // 4)
            return Streaming(sinks, keys - sinks)
        case "window":
            return Streaming(0, keys)
        case "h2o":
            return H2O((keys - 1) // 2, keys - 1 - (keys - 1) // 2)
        case "snapkv":
            return SnapKV(keys - CHUNK, window=CHUNK // 2) if keys - CHUNK > CHUNK // 2 else None
        case "random":
            return Random(keys - 1, torch.rand(length, generator=torch.Generator().manual_seed(0)))
    raise ConfigError(f"--policy {name} is not known; there are {', '.join(POLICIES)}.")


POLICIES = ("whole", "forgotten", "streaming", "window", "h2o", "snapkv", "random")
"""whole keeps all."""


def curve(engine: Engine, pairs: Pairs, policies: Sequence[str], budgets: Sequence[int], done: Callable[[], None]) -> list[BudgetRow]:
    """A row for each policy and budget. All ranks call it together and return the same but for the seconds."""
    rows, length = [], pairs[0].shape[1]
    for name in policies:
        for keys in (length,) if name == "whole" else budgets:
            policy = None if name == "whole" else policy_of(name, keys, length)
            if policy is not None or name == "whole":
                rows.append(_row(engine, pairs, name, policy, [keys] * engine.num_layers))
            done()
    return rows


def search(engine: Engine, pairs: Pairs, start: int, step: int, rise: float, done: Callable[[], None]) -> list[BudgetRow]:
    """A row for the budgets that the search begins with, and one for each cut. All ranks call it together and return the same."""
    rows = [_row(engine, pairs, "forgotten", Forgotten(start), [start] * engine.num_layers)]
    while True:
        budgets, tried = rows[-1].budgets, []
        for layer in range(engine.num_layers):
            less = budgets[layer] - step
            if less >= 2:
                cut = [*budgets[:layer], less, *budgets[layer + 1 :]]
                tried.append(_row(engine, pairs, "forgotten", Forgotten(tuple(cut)), cut))
                done()
        best = min(tried, key=lambda row: row.loss, default=None)
        if best is None or best.loss > rows[0].loss + rise:
            return rows
        rows.append(best)


def _row(engine: Engine, pairs: Pairs, name: str, policy: CachePolicy | None, budgets: list[int]) -> BudgetRow:
    (loss, exact), cost = counted(engine, lambda: predicted(engine, pairs, policy))
    length, mean = pairs[0].shape[1], sum(budgets) / len(budgets)
    seen = sum(min(i + 1, keys) for keys in budgets for i in range(length))
    cost["density"] = seen / len(budgets) / (length * (length + 1) / 2)
    task, in_reach = engine.config.training, None
    if task.data == "variables":
        in_reach = float((variables.ages(task.variables, *pairs) < mean).float().mean())
    found: dict[str, Any] = {"policy": name, "budgets": budgets, "keys": mean, "loss": loss, "exact": exact, "in_reach": in_reach}
    return BudgetRow(length=length, depth=None, correct=None, **cost, **found)


@torch.no_grad()
def predicted(engine: Engine, pairs: Pairs, policy: CachePolicy | None) -> tuple[float, float]:
    """The mean loss and the share of exact predictions of these sequences, ids and labels (b S), under a policy."""
    ids, labels = (x.to(engine.device) for x in pairs)
    context, ring, length = engine.context, engine.ring, ids.shape[1]
    cache = KVCache(engine.num_layers, ring.rank, ring.size, engine.config.cache.page, room=length)
    at_steps = policy is None or policy.at_steps
    evictor = None if policy is None else Evictor(policy, engine.num_layers, each_chunk=not at_steps)
    engine.extend(length)
    before, context.evictor = context.evictor, evictor
    total = torch.zeros(3, dtype=torch.float64)
    try:
        for begin in range(0, length, 1 if at_steps else CHUNK):
            end = min(begin + (1 if at_steps else CHUNK), length)
            total += _step(engine, cache, ids[:, begin:end], labels[:, begin:end], begin, at_steps)
    finally:
        context.evictor = before
    lost, hits, count = total.tolist()
    return lost / count, hits / count


def _step(engine: Engine, cache: KVCache, ids: Tensor, labels: Tensor, begin: int, decoding: bool) -> Tensor:
    """Loss, hits and number of the labels of these tokens, which come next; of all ranks."""
    count, ring = ids.shape[1], engine.ring
    if decoding:
        cache.grow(count)
        own, running = torch.arange(begin, begin + count), engine.context.running(cache=cache, decoding=True)
    else:
        layout = Layout.contiguous(count, ring.size).shifted(begin)
        cache.extend(layout)
        own, running = layout.indices(ring.rank), engine.context.running(layout, cache)
    at = own - begin if len(own) else torch.zeros(1, dtype=torch.int64)
    with running:
        logits = engine.model(input_ids=ids[:, at], position_ids=(at + begin)[None].to(ids.device), use_cache=False).logits
    answers = labels[:, at] if len(own) else torch.full_like(labels[:, at], IGNORED)
    flat, answers = logits.flatten(0, 1).float(), answers.flatten()
    lost = cross_entropy(flat, answers, ignore_index=IGNORED, reduction="sum")
    found = torch.stack((lost.double(), (flat.argmax(-1) == answers).sum().double(), (answers != IGNORED).sum().double())).cpu()
    if decoding or ring.size == 1:
        return found
    return torch.stack(share(ring, found, "losses")).sum(0)


def pairs_of(engine: Engine, length: int) -> Pairs:
    """The held-out sequences of `training` of this length."""
    config = engine.config.training
    known = data_of(config, Path(config.out), None if config.scratch.layers else engine.tokenizer).held_out()
    if length not in known:
        raise ConfigError(f"--length is {length}, but held-out sequences have {', '.join(map(str, known))} tokens; ask for one of these.")
    return known[length]
