"""Selectors by their definitions: whole tensors on one process in float64, token by token or block by block, nothing shared with ringctx.

q (N h d) and k (N g d) encoded, the queries being the last ones of the sequence -> bool (h, N, N), causal; rows without a query are False.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ringctx.methods.selectors import AShape, FlexPrefill, Moba, Quest, Representatives, Sparge, VerticalSlash, XAttention


def keeps(selector: Any, q: Tensor, k: Tensor) -> Tensor:
    """Which keys each query sees, by definition: q (t h d) are the last t of k's N tokens; bool (h, t, N)."""
    n, t = len(k), len(q)
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    per_head = {
        VerticalSlash: vertical_slash, AShape: a_shape, FlexPrefill: flex_prefill, XAttention: x_attention,
        Sparge: sparge, Quest: quest, Representatives: representatives, Moba: moba,
    }[type(selector)]  # fmt: skip
    causal = torch.arange(n) <= torch.arange(n - t, n)[:, None]
    return torch.stack([per_head(selector, q[:, h].double(), k[:, h]) & causal for h in range(q.shape[1])])


def best(scores: list[float], count: int) -> set[int]:
    """The places of the largest, equal ones in float32 from the lowest on; never of -inf."""
    rounded = (torch.tensor(scores, dtype=torch.float64) * 2**-0.5).float().tolist()
    order = sorted(range(len(scores)), key=lambda x: (-rounded[x], x))
    return {x for x in order[:count] if rounded[x] > -math.inf}


def within(weights: list[float], share: float) -> int:
    total, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        total += weight
        count += float(torch.tensor(total, dtype=torch.float64).float()) <= float(torch.tensor(share).float())
    return count


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1)


def hidden(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(mask, -torch.inf)


def weights_of_last(q: Tensor, k: Tensor, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """(the last queries' causal softmax (L N), its sum by key (N,), its sum by distance (N,))."""
    n, some = len(k), q[-last:]
    i, j = torch.arange(n - len(some), n)[:, None], torch.arange(n)
    a = softmax(hidden(some @ k.T / math.sqrt(k.shape[1]), j > i))
    by_distance = torch.tensor([float(a[i - j == d].sum()) for d in range(n)], dtype=torch.float64)
    return a, a.sum(0), by_distance


def vertical_slash(s: VerticalSlash, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    _, vertical, slash = weights_of_last(q, k, s.last)
    columns = best([math.inf if j < s.first else x for j, x in enumerate(vertical.tolist())], s.verticals)
    offsets = best([math.inf if d < s.near else x for d, x in enumerate(slash.tolist())], s.slashes)
    seen = torch.zeros(t, n, dtype=torch.bool)
    seen[:, sorted(columns)] = True
    for row, i in enumerate(range(n - t, n)):
        first = i // s.tile * s.tile
        for offset in offsets:
            for other in range(first, first + s.tile):
                if 0 <= other - offset < n:
                    seen[row, other - offset] = True
    return seen


def a_shape(s: AShape, q: Tensor, k: Tensor) -> Tensor:
    i, j = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
    return (j < s.initial) | (i - j < s.local)


def means(x: Tensor, first: int, block: int, count: int) -> Tensor:
    """The mean of the tokens (whose first index is given) in each of so many blocks; 0 where there are none."""
    indices = torch.arange(first, first + len(x)) // block
    return torch.stack([x[indices == b].mean(0) if (indices == b).any() else torch.zeros(x.shape[1]).double() for b in range(count)])


def spread(tiles: Tensor, first: int, n: int, q_block: int, k_block: int) -> Tensor:
    """Tiles (m, n) -> tokens (t, N)."""
    return tiles[torch.arange(first, n) // q_block][:, torch.arange(n) // k_block]


def flex_prefill(s: FlexPrefill, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    if t <= max(2 * s.block, s.least):
        return torch.ones(t, n, dtype=torch.bool)
    a, vertical, slash = weights_of_last(q, k, s.block)
    vertical, slash = vertical / len(a), slash / len(a)
    count, scale = -(-n // s.block), 1 / math.sqrt(k.shape[1])
    columns = [float(x.sum()) for x in vertical.split(s.block)]
    diagonals = [float(x.sum()) for x in slash.split(s.block)]
    pooled_q, pooled_k = means(q, n - t, s.block, count), means(k, 0, s.block, count)
    guess, true = softmax(pooled_k @ q[-s.block :].mean(0) * scale), torch.tensor(columns, dtype=torch.float64)
    middle = (guess + true) / 2
    divergence = sum(float(torch.special.xlogy(x, x / middle).sum()) for x in (guess, true)) / 2
    least = -(-s.least // s.block)
    aware = math.sqrt(max(divergence, 0.0)) < s.tau
    wide = [least if aware else max(within(x.tolist(), s.gamma) // s.block + 1, least) for x in (vertical, slash)]
    kept_columns, kept_diagonals = (best([math.inf, *x[1:]], w) for x, w in zip((columns, diagonals), wide, strict=True))
    first = (n - t) // s.block
    tiles = torch.zeros(count, count, dtype=torch.bool)
    for m in range(first, count):
        for b in range(m + 1):
            tiles[m, b] = b in kept_columns or m - b in kept_diagonals
    if aware:
        rows = range(first, count)
        pooled = [softmax(pooled_k[: m + 1] @ pooled_q[m] * scale).tolist() + [0.0] * (count - m - 1) for m in rows]
        flat = [x / len(rows) for row in pooled for x in row]
        for place in best(flat, within(flat, s.gamma)):
            tiles[first + place // count, place % count] = True
    return spread(tiles, n - t, n, s.block, s.block)


def x_attention(s: XAttention, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    count = -(-n // s.block)
    whole_q, whole_k = torch.zeros(2, count * s.block, k.shape[1], dtype=torch.float64)
    whole_q[n - t : n], whole_k[:n] = q, k
    cells = count * s.block // s.stride
    products = torch.zeros(cells, cells, dtype=torch.float64)
    for a in range(s.stride):
        products += whole_q[s.stride - 1 - a :: s.stride] @ whole_k[a :: s.stride].T
    x, y = torch.arange(cells)[:, None], torch.arange(cells)
    weights = softmax(hidden(products / (math.sqrt(k.shape[1]) * s.stride), (y > x) | (y * s.stride >= n)))
    each = s.block // s.stride
    tiles = torch.zeros(count, count, dtype=torch.bool)
    for m in range((n - t) // s.block, count):
        scores = weights[m * each : (m + 1) * each].sum(0).view(-1, each).sum(1).tolist()
        kept = {0, m}
        for b in sorted(range(m + 1), key=lambda b: (-float(torch.tensor(scores[b]).float()), b)):
            if sum(scores[x] for x in kept) >= s.threshold * sum(scores):
                break
            kept.add(b)
        tiles[m, sorted(kept)] = True
    return spread(tiles, n - t, n, s.block, s.block)


def sparge(s: Sparge, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    k = k - k.mean(0) if s.smooth else k
    m_count, n_count = -(-n // s.block_q), -(-n // s.block_k)

    def alike(x: Tensor, first: int, block: int, count: int) -> list[bool]:
        found, indices = [], torch.arange(first, first + len(x)) // block
        for b in range(count):
            rows = torch.nn.functional.normalize(x[indices == b], dim=-1)
            found.append(bool(len(rows)) and float((rows @ rows.T).mean()) > s.similarity)
        return found

    q_alike, k_alike = alike(q, n - t, s.block_q, m_count), alike(k, 0, s.block_k, n_count)
    pooled_q, pooled_k = means(q, n - t, s.block_q, m_count), means(k, 0, s.block_k, n_count)
    tiles = torch.zeros(m_count, n_count, dtype=torch.bool)
    for m in range((n - t) // s.block_q, m_count):
        seen = [b for b in range(n_count) if b * s.block_k < (m + 1) * s.block_q]
        judged = [b for b in seen if k_alike[b]]
        weights = softmax(pooled_k[judged] @ pooled_q[m] / math.sqrt(k.shape[1])).tolist()
        chosen = {judged[x] for x in best(weights, max(1, within(weights, s.mass)))}
        tiles[m, sorted(b for b in seen if b in chosen or not k_alike[b] or not q_alike[m])] = True
    own = torch.arange(n) == torch.arange(n - t, n)[:, None]
    return spread(tiles, n - t, n, s.block_q, s.block_k) | own


def quest(s: Quest, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    tiles = torch.zeros(t, -(-n // s.page), dtype=torch.bool)
    pages = k.split(s.page)
    for row, i in enumerate(range(n - t, n)):
        bounds = [float(torch.maximum(q[row] * p.amin(0), q[row] * p.amax(0)).sum()) for p in pages]
        bounds = [x if b * s.page <= i else -math.inf for b, x in enumerate(bounds)]
        tiles[row, sorted(best(bounds, s.pages))] = True
    return tiles[:, torch.arange(n) // s.page]


def representatives(s: Representatives, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    recent = min(s.recent, t)
    relevance = [sum(float(q[t - n + i] @ k[j]) for i in range(max(j, n - recent), n)) for j in range(n)]
    scores = []
    for first in range(0, n, s.block):
        few = sorted(relevance[first : first + s.block], reverse=True)[: s.representatives]
        scores.append(sum(few) / len(few))
    chosen = torch.tensor([b in best(scores, s.blocks) for b in range(len(scores))])
    i, j = torch.arange(n - t, n)[:, None], torch.arange(n)
    return (j < s.initial) | (i - j < s.local) | chosen[j // s.block]


def moba(s: Moba, q: Tensor, k: Tensor) -> Tensor:
    n, t = len(k), len(q)
    tiles = torch.zeros(t, -(-n // s.block), dtype=torch.bool)
    for row, i in enumerate(range(n - t, n)):
        own = i // s.block
        scores = [float(q[row] @ k[b * s.block : (b + 1) * s.block].mean(0)) for b in range(own)] + [math.inf]
        tiles[row, sorted(best(scores, s.blocks))] = True
    return tiles[:, torch.arange(n) // s.block]
