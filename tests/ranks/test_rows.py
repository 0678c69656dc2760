"""Measures of attention's rows over ranks are those of the dense matrix, and cost the keys' bytes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ringctx import Attention, Layout, Ring
from ringctx.core.rows import Rows, measure_rows
from ringctx.errors import Unsupported
from ringctx.methods import sparsity
from ringctx.methods.branches import rerope
from ringctx.methods.rotary import Rotary
from ringctx.methods.scores import Alibi, Softcap
from ringctx.patterns import causal, per_head, sinks, window
from ringctx.testing import golden_inputs
from tests.pool import Pool

S, H, G, D = 61, 4, 2, 8
EDGES, FIRST = (0, 1, 4, 16), 3
ROTARY = Rotary((1.0, 0.3, 0.05, 0.004))
ATTENTIONS = {
    "causal": Attention(encoding=ROTARY),
    "window": Attention(causal() & (window(9) | sinks(2)), scores=(Softcap(3.0), Alibi.standard(H)), scale=2.0),
    "heads": Attention(causal() & per_head({window(5): (0, 3), causal(): (1, 2)}), encoding=ROTARY),
    "half": Attention(sink=torch.full((H,), 2.0, dtype=torch.float64), scale=2.0),
    "sink": Attention(sink=torch.tensor([-40.0, 0.3, 2.0, 300.0], dtype=torch.float64), scale=30.0),
}


def dense(attention: Attention) -> tuple[Tensor, Tensor]:
    """Weights and who is seen (b h S S), by definition."""
    q, k, _, _ = golden_inputs(2, H, S, D, G)
    i = torch.arange(S)
    if attention.encoding is not None:
        q, k = attention.encoding.queries(q, i), attention.encoding.keys(k, i)
    logits = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(H // G, 2)) * (attention.scale or D**-0.5)
    for score in attention.elementwise:
        logits = score.apply(logits)
    for score in attention.additive:
        logits = logits + score.bias(torch.arange(H), i, i, score.params())
    allowed = attention.pattern.allows(i, i)
    seen = allowed[(None,) * (4 - allowed.dim())].expand(logits.shape)
    logits = logits.masked_fill(~seen, -torch.inf)
    if attention.sink is not None:
        logits = torch.cat((logits, attention.sink[:, None, None].expand(2, H, S, 1)), -1)
    return logits.softmax(-1)[..., :S], seen


def measured(ring: Ring, kind: str, name: str, dtype: torch.dtype, every: int) -> tuple[Tensor, dict[str, Tensor], int]:
    """Rows of every so many of this rank's queries: their indices, the measures, and the bytes of keys that were sent."""
    q, k, _, _ = (x.to(dtype) for x in golden_inputs(2, H, S, D, G))
    layout = getattr(Layout, kind)(S, ring.size)
    i = layout.indices(ring.rank)[::every]
    ring.traffic.reset()
    found = measure_rows(
        q[:, i], layout.shard(k, ring.rank), i=i, layout=layout, ring=ring, attention=ATTENTIONS[name], edges=EDGES, first=FIRST
    )
    wanted = ("lse", "seen", "weight", "entropy", "square", "largest", "distance", "first", "hoyer", "effective_count")
    return i, {name: getattr(found, name) for name in wanted}, ring.traffic.sent["rows"]


def check(parts: list[tuple[Tensor, dict[str, Tensor], int]], name: str, bar: float) -> None:
    p, seen = dense(ATTENTIONS[name])
    far = torch.arange(S)[:, None] - torch.arange(S)
    bins = torch.bucketize(far, torch.tensor(EDGES), right=True)
    want: dict[str, Tensor] = {
        "seen": seen.sum(-1), "weight": p.sum(-1), "entropy": sparsity.entropy(p), "square": p.square().sum(-1), "largest": p.amax(-1),
        "first": p[..., :FIRST].sum(-1), "distance": torch.stack([(p * (bins == n)).sum(-1) for n in range(len(EDGES) + 1)], -1),
    }  # fmt: skip
    for i, found, _ in parts:
        for what, whole in want.items():
            error = (found[what].double() - whole[:, :, i].transpose(1, 2)).abs().max()
            assert error <= bar, (what, float(error))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", ["zigzag", "striped", "contiguous"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_measure_what_the_matrix_says(pool: Pool, size: int, kind: str, name: str) -> None:
    parts = pool.run(measured, kind, name, torch.float64, 1, size=size)
    check(parts, name, 1e-12)
    visits = [sum(Layout.zigzag(S, size).count(r) for r in range(size) if r != rank) for rank in range(size)]
    if kind == "zigzag":  # each rank's keys, once around, and their indices
        assert sum(part[2] for part in parts) == sum(visits) * (2 * G * D + 1) * 8


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_rank_and_some_rows_and_fp32(name: str) -> None:
    check([measured(Ring.alone(), "contiguous", name, torch.float64, 7)], name, 1e-12)
    check([measured(Ring.alone(), "contiguous", name, torch.float32, 1)], name, 2e-5)


def test_logits_that_grow_from_tile_to_tile_are_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringctx.core import rows

    monkeypatch.setattr(rows, "KEYS", 5)
    monkeypatch.setattr(rows, "ROWS", 7)
    for name in ATTENTIONS:
        check([measured(Ring.alone(), "contiguous", name, torch.float64, 1)], name, 1e-12)


def test_hoyer_and_counts_follow_from_the_sums() -> None:
    for name in ("causal", "half"):  # of the latter a sink takes a share, and what is left counts
        p, _ = dense(ATTENTIONS[name])
        _, found, _ = measured(Ring.alone(), "contiguous", name, torch.float64, 1)
        for row in (1, 17, 60):
            ours = found["hoyer"][0, row], found["effective_count"][0, row]
            keys = p[0, :, row, : row + 1]
            for a, b in zip(ours, (sparsity.hoyer(keys), sparsity.effective_count(keys / keys.sum(-1, keepdim=True))), strict=True):
                assert torch.allclose(a, b, atol=1e-12)
        assert (found["hoyer"][:, 0] == 1).all()


@pytest.mark.parametrize("asked", [{"branches": rerope(5, ROTARY)}, {"dropout": 0.1}])
def test_what_has_no_such_rows_is_refused(asked: dict[str, Any]) -> None:
    q, k, _, _ = golden_inputs(1, H, S, D, G)
    with pytest.raises(Unsupported):
        measure_rows(q, k, i=torch.arange(S), layout=Layout.contiguous(S, 1), ring=Ring.alone(), attention=Attention(**asked))


def test_nothing_seen_measures_nothing() -> None:
    q, k, _, _ = golden_inputs(1, H, S, D, G)
    rows: Rows = measure_rows(
        q[:, :3], k, i=torch.arange(3), layout=Layout.contiguous(S, 1), ring=Ring.alone(), attention=Attention(causal() & ~window(5))
    )
    assert all(not x.any() for x in (rows.seen, rows.entropy, rows.square, rows.largest, rows.distance)) and rows.lse.isneginf().all()
