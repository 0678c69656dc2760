"""Eviction by its definition: one dense float64 run over calls (chunks, then single tokens), and the same run on ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.huggingface import Context
from ringctx.methods.eviction import H2O, CachePolicy, Duo, PyramidKV, SnapKV, Streaming
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, Softcap
from ringctx.runtime.cache import KVCache
from ringctx.runtime.evict import Evictor

NUM_READ, CHUNK, NUM_NEW = 41, 13, 7
BATCH, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8
ROTARY = Attention(encoding=Rotary((1.0, 0.3)))
SCORED = Attention(
    encoding=Rotary((1.0, 0.3)), scores=(Softcap(3.0), Alibi.standard(HEADS)), sink=torch.tensor([0.3, -0.2, 0.1, 0.5]).double()
)
POLICIES: dict[str, CachePolicy] = {
    "streaming": Streaming(2, 6),
    "duo": Duo(2, 6, frozenset({(0, 1)})),
    "h2o": H2O(5, 4),
    "snapkv": SnapKV(14, window=5, kernel=3),
    "pyramidkv": PyramidKV(14, window=5, kernel=3, pooling="max", beta=2),
}
Calls = list[tuple[range, bool]]


def calls() -> Calls:
    """The indices of each call, and whether it is a decoded token."""
    chunks = [(range(a, min(a + CHUNK, NUM_READ)), False) for a in range(0, NUM_READ, CHUNK)]
    return chunks + [(range(n, n + 1), True) for n in range(NUM_READ, NUM_READ + NUM_NEW)]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """q (b S h d), k and v (b S g d) in float64."""
    generator = torch.Generator().manual_seed(3)
    n = NUM_READ + NUM_NEW
    return tuple(torch.randn(BATCH, n, heads, WIDTH, dtype=torch.float64, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))  # type: ignore[return-value]


def by_definition(policy: CachePolicy, attention: Attention, each_chunk: bool) -> tuple[Tensor, list[list[set[int]]]]:
    """out (b S h d) and, for each batch row and key head, the indices that are left."""
    q, k, v = inputs()
    weights_of, ratio = _weights(attention, q, k), HEADS // KEY_HEADS
    held: list[list[list[int]]] = [[[] for _ in range(KEY_HEADS)] for _ in range(BATCH)]
    mass = torch.zeros(BATCH, KEY_HEADS, q.shape[1], dtype=torch.float64)
    out = torch.zeros_like(q)
    for span, decoding in calls():
        stretch = span if decoding or each_chunk else range(NUM_READ)
        voters = _voters(policy, stretch)
        for b in range(BATCH):
            for g in range(KEY_HEADS):
                held[b][g] += span
                for h in range(g * ratio, (g + 1) * ratio):
                    for i in span:
                        seen = [j for j in held[b][g] if j <= i]
                        p = weights_of(b, h, i, seen)
                        out[b, i, h] = p @ v[b, seen, g]
                        if i in voters:
                            mass[b, g, seen] += p / ratio
        if (decoding and isinstance(policy, Streaming | H2O)) or (not decoding and (each_chunk or span.stop == NUM_READ)):
            for b in range(BATCH):
                for g in range(KEY_HEADS):
                    held[b][g] = left(policy, g, held[b][g], mass[b, g], len(voters))
            if not isinstance(policy, H2O):
                mass.zero_()
    return out, [[set(heads) for heads in rows] for rows in held]


def left(policy: CachePolicy, head: int, held: list[int], mass: Tensor, num_voters: int = 0) -> list[int]:
    """What the papers say is left of these keys of layer 0."""
    end = held[-1] + 1
    match policy:
        case Streaming():
            if isinstance(policy, Duo) and (0, head) not in policy.streaming:
                return held
            return [j for j in held if j < policy.sinks or j > end - policy.recent]
        case H2O():
            if len(held) <= policy.heavy + policy.recent:
                return held
            old = sorted((j for j in held if j < end - policy.recent), key=lambda j: (-float(mass[j]), j))
            return sorted([*old[: policy.heavy], *(j for j in held if j >= end - policy.recent)])
        case SnapKV():
            keys = policy.budget(0, 1, end)
            if len(held) <= keys:
                return held
            old, half = [j for j in held if j < end - num_voters], policy.kernel // 2
            near = lambda n: [float(mass[old[m]]) if 0 <= m < len(old) else 0.0 for m in range(n - half, n + half + 1)]
            pool = (lambda x: sum(x) / len(x)) if policy.pooling == "avg" else max
            best = sorted(range(len(old)), key=lambda n: (-pool(near(n)), n))[: keys - num_voters]
            return sorted([*(old[n] for n in best), *(j for j in held if j >= end - num_voters)])
    raise AssertionError(policy)


def _voters(policy: CachePolicy, stretch: range) -> range:
    if isinstance(policy, H2O):
        return stretch
    return range(max(stretch.start, stretch.stop - policy.window), stretch.stop) if isinstance(policy, SnapKV) else range(0)


def _weights(attention: Attention, q: Tensor, k: Tensor) -> Any:
    """Weights of one query over some keys."""
    every = torch.arange(q.shape[1])
    assert attention.encoding is not None
    q, k = attention.encoding.queries(q, every), attention.encoding.keys(k, every)

    def weights(b: int, h: int, i: int, seen: list[int]) -> Tensor:
        logits = k[b, seen, h * KEY_HEADS // HEADS] @ q[b, i, h] / math.sqrt(WIDTH)
        for score in attention.elementwise:
            logits = score.apply(logits)
        for score in attention.additive:
            logits = logits + score.bias(torch.tensor([h]), torch.tensor([i]), torch.tensor(seen), score.params())[0, 0]
        more = [] if attention.sink is None else [attention.sink[h : h + 1]]
        return torch.cat([logits, *more]).softmax(0)[: len(seen)]

    return weights


def on_rank(
    ring: Any, policy: CachePolicy, attention: Attention, kind: str, each_chunk: bool, storage: str = "model"
) -> tuple[list[tuple[Tensor, Tensor]], list[list[set[int]]], int]:
    """(indices, out) of each call's own rows, what this rank holds at the end, and its bytes."""
    q, k, v = inputs()
    context = Context(ring, evictor=Evictor(policy, 1, each_chunk, None if each_chunk else range(NUM_READ)))
    cache = KVCache(1, ring.rank, ring.size, page=4, storage=storage, keep_rotated=kind != "striped")
    outs = []
    for span, decoding in calls():
        if decoding:
            cache.grow()
            own, running = torch.tensor([span[0]]), context.running(cache=cache, decoding=True)
        else:
            layout = getattr(Layout, kind)(len(span), ring.size).shifted(span.start)
            cache.extend(layout)
            own, running = layout.indices(ring.rank), context.running(layout, cache)
        fed = own if len(own) else torch.tensor([0])
        with running, torch.no_grad():
            out = context.attend(0, q[:, fed], k[:, fed], v[:, fed], attention)
        outs.append((own, out[:, : len(own)]))
    sets = [[set[int]() for _ in range(KEY_HEADS)] for _ in range(BATCH)]
    for part in cache.parts(0):
        for place, head in enumerate(part.heads):
            for b in range(BATCH):
                found = [j for j in part.indices[b, place].tolist() if j >= 0]
                assert len(found) == len(set(found))
                sets[b][head] = set(found)
    return outs, sets, cache.bytes
