"""Methods that are functions, by their papers' words on whole tensors: loops and masks, nothing shared with ringctx but encodings.

Letters: b batch, S tokens, h query heads, g key heads, d width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Tensors = dict[str, Tensor]


def causal(length: int) -> Tensor:
    """bool (S S)."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    """(b h S K), scaled."""
    return torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * q.shape[3] ** -0.5


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """seen (S K) or (h S K). Rows that see nothing are 0."""
    weights = logits_of(q, k).masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bjhe->bihe", weights, v.repeat_interleave(q.shape[2] // v.shape[2], 2))


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated by halves, at 0, 1, 2, ..."""
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequencies
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def encoded(tokens: Tensors, encoding: Any, q: str = "q", k: str = "k") -> tuple[Tensor, Tensor]:
    """Queries and keys of a whole sequence, by an encoding that tests of its own compare with its paper."""
    at = torch.arange(tokens[q].shape[1])
    return encoding.queries(tokens[q], at), encoding.keys(tokens[k], at)


def clex_frequencies(up: Tensor, down: Tensor, flow: Any, t: float) -> Tensor:
    """The flow's end at t, of these weights."""
    return torch.func.functional_call(_Frequencies(flow), {"flow.up": up, "flow.down": down}, (t,))


class _Frequencies(torch.nn.Module):
    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, t: float) -> Tensor:
        return self.flow.frequencies(t)


def nsa(tokens: Tensors, block: int, count: int, width: int, encoding: Any) -> Tensor:
    """Row by row: compressed, chosen, window, weighed by gates."""
    (q, k), v, gates = encoded(tokens, encoding), tokens["v"], tokens["gates"]
    b, length, h, _ = q.shape
    g, full = k.shape[2], length // block
    means = [x[:, : full * block].unflatten(1, (full, block)).mean(2) for x in (k, v)]
    i = torch.arange(length)
    visible = torch.arange(full) * block + block - 1 <= i[:, None]
    compressed = softmax_attention(q, *means, visible)
    weights = logits_of(q, means[0]).masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0).detach()
    found = []
    for row in range(b):
        seen = torch.zeros(h, length, length, dtype=torch.bool)
        for t in range(length):
            own = t // block
            for group in range(g):
                heads = range(group * h // g, (group + 1) * h // g)
                score = {n: float(sum(weights[row, head, t, n] for head in heads)) for n in range(own)} | {own: float(len(heads))}
                best = sorted(score, key=lambda n: (-torch.tensor(score[n]).float().item(), n))[:count]
                for head in heads:
                    for n in best:
                        seen[head, t, n * block : min((n + 1) * block, t + 1)] = True
        one = [x[row : row + 1] for x in (q, k, v)]
        near = causal(length) & (i[:, None] - i < width)
        parts = (compressed[row : row + 1], softmax_attention(*one, seen), softmax_attention(*one, near))
        found.append(sum(gates[row : row + 1, ..., n, None] * part for n, part in enumerate(parts)))
    return torch.cat(found)


def indexed(tokens: Tensors, index: Any, top: int) -> Tensor:
    """Each query over the keys of the largest I, one by one."""
    q, k, v = tokens["q"], tokens["k"], tokens["v"]
    found = []
    for row in range(len(q)):
        seen = torch.zeros(q.shape[1], q.shape[1], dtype=torch.bool)
        for t in range(q.shape[1]):
            scores = [float((index.w[row, t] * (index.k[row, s] @ index.q[row, t].T).relu()).sum()) for s in range(t + 1)]
            order = sorted(range(t + 1), key=lambda s: (-torch.tensor(scores[s]).float().item(), s))
            seen[t, order[:top]] = True
        found.append(softmax_attention(*(x[row : row + 1] for x in (q, k, v)), seen))
    return torch.cat(found)


def apb(tokens: Tensors, how: Any, encoding: Any) -> Tensor:
    """Anchor, what passes of each earlier block, the own block; after the context all."""
    (q, k), v = encoded(tokens, encoding), tokens["v"]
    length, g, found = q.shape[1], k.shape[2], []
    for row in range(len(q)):
        seen = torch.zeros(q.shape[2], length, length, dtype=torch.bool)
        for head in range(q.shape[2]):
            worth = tokens["scores"][row, :, head * g // q.shape[2]].tolist()
            passed = {
                key
                for first in range(0, how.context, how.block)
                for key in sorted(range(first, min(first + how.block, how.context)), key=lambda key: (-worth[key], key))[: how.passing]
            }
            for t in range(length):
                own = {key for key in range(t + 1) if t >= how.context or key // how.block == t // how.block}
                seen[head, t, [key for key in own | passed | set(range(how.anchor)) if key <= t]] = True
        found.append(softmax_attention(*(x[row : row + 1] for x in (q, k, v)), seen))
    return torch.cat(found)


def forgetting(tokens: Tensors, encoding: Any) -> Tensor:
    """Each weight times the product of the gates after its key, up to the query's."""
    (q, k), length = encoded(tokens, encoding), tokens["q"].shape[1]
    gates, weights = tokens["gates"].exp().transpose(1, 2), logits_of(q, k).exp()
    rows = [
        torch.stack([gates[..., j + 1 : i + 1].prod(-1) if j <= i else torch.zeros_like(gates[..., 0]) for j in range(length)], -1)
        for i in range(length)
    ]
    weights = weights * torch.stack(rows, -2)
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhe->bihe", weights, tokens["v"].repeat_interleave(q.shape[2] // k.shape[2], 2))


def longformer(tokens: Tensors, named: set[int], window: int) -> Tensor:
    """One softmax over window and global columns; rows of global tokens by projections of their own."""
    i = torch.arange(tokens["q"].shape[1])
    is_global = torch.tensor([int(n) in named for n in i])
    local = softmax_attention(tokens["q"], tokens["k"], tokens["v"], ((i[:, None] - i).abs() <= window) | is_global)
    of_all = softmax_attention(*(tokens[f"global {x}"] for x in "qkv"), torch.ones(len(i), len(i), dtype=torch.bool))
    return torch.where(is_global[:, None, None], of_all, local)


def longnet(tokens: Tensors, reaches: tuple[tuple[int, int], ...], encoding: Any) -> Tensor:
    """Numerators and denominators of all reaches, added: a key of two reaches counts twice."""
    q, k = encoded(tokens, encoding)
    i = torch.arange(q.shape[1])
    exp = logits_of(q, k).exp()
    weights = torch.zeros_like(exp)
    for segment, rate in reaches:
        seen = (i <= i[:, None]) & (i // segment == (i // segment)[:, None]) & ((i[:, None] - i) % rate == 0)
        weights = weights + exp * seen
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhe->bihe", weights, tokens["v"].repeat_interleave(q.shape[2] // k.shape[2], 2))


def gau(x: Tensor, params: Tensors, hidden: int, softmax: bool, encoding: Any) -> Tensor:
    """Both gates around one head."""
    u, v, z = silu(x @ params["inward.weight"].T).split((hidden, hidden, params["gamma"].shape[1]), -1)
    q, k = (z * gamma + beta for gamma, beta in zip(params["gamma"], params["beta"], strict=True))
    q, k = (y.squeeze(2) for y in encoded({"q": q.unsqueeze(2), "k": k.unsqueeze(2)}, encoding))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    seen = causal(x.shape[1])
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1) if softmax else logits.relu().square() * seen / x.shape[1]
    return (u * (weights @ v)) @ params["outward.weight"].T


def synthesizer(kind: str, tokens: Tensors, params: Tensors) -> Tensor:
    """softmax of logits that are a table, factors of one, said by the query's token, or a mixture; causal."""
    v = tokens["v"]
    n = v.shape[1]
    if kind == "random":
        logits = params["table"][:, :n, :n].expand(len(v), -1, -1, -1)
    elif kind == "factorised random":
        logits = (params["left"] @ params["right"].mT)[:, :n, :n].expand(len(v), -1, -1, -1)
    elif kind == "dense":
        inner = (tokens["x"] @ params["inward.weight"].T + params["inward.bias"]).relu().unflatten(-1, (v.shape[2], -1))
        logits = torch.einsum("bihr,hjr->bhij", inner, params["keys"][:, :n])
    elif kind == "factorised dense":
        rows = (tokens["x"] @ params["rows.weight"].T + params["rows.bias"]).unflatten(-1, (v.shape[2], -1))
        outer, inner = rows.split((6, 8), -1)
        logits = torch.stack([outer[..., j // 8] * inner[..., j % 8] for j in range(n)], -1).transpose(1, 2)
    else:
        weight = params["alpha"].sigmoid()
        logits = (1 - weight) * logits_of(tokens["q"], tokens["k"]) + weight * params["table.table"][:, :n, :n]
    return torch.einsum("bhij,bjhe->bihe", logits.masked_fill(~causal(n), -math.inf).softmax(-1), v)
