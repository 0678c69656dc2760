"""Selectors: the golden values of their definitions, what they refuse, and the configuration that asks for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ringctx import Attention, ConfigError, Layout, Ring, Unsupported, explain
from ringctx.asked.selecting import KINDS, selecting, selector_of
from ringctx.config import parse
from ringctx.core.select import Selector, Sight
from ringctx.methods.selectors import AShape, FlexPrefill, Moba, Quest, Representatives, Sparge, VerticalSlash, XAttention, flex_prefill
from ringctx.methods.selectors.summaries import largest, within_share
from ringctx.patterns import blocks, causal
from ringctx.testing import dense, golden_inputs

N = 64
LAYOUT = Layout.contiguous(N, 1)
SIGHT = Sight(Ring.alone(), LAYOUT, LAYOUT, 8**-0.5)
INDEX = torch.arange(N)
Q, K, V, _ = golden_inputs()


def seen(selector: Selector, q: Tensor = Q, k: Tensor = K, sight: Sight = SIGHT) -> Tensor:
    """bool (2, N, N), causal."""
    return (causal() & selector.select(q[0], k[0], sight)).allows(INDEX, INDEX).expand(2, -1, -1)


def tiles(mask: Tensor, rows: int, columns: int) -> Tensor:
    return mask.unfold(-2, rows, rows).unfold(-2, columns, columns).flatten(-2).any(-1)


def places(row: Tensor) -> set[int]:
    return set(row.nonzero().flatten().tolist())


def slow(phase: float) -> Tensor:
    """The golden inputs' closed form, ten times slower along the sequence and alike in both heads."""
    n, d = torch.arange(N, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    x = torch.sin(0.07 * n + 1.3 * d + phase) + 0.5 * torch.cos(0.031 * n * (d + 1) + phase)
    return x[None, :, None].expand(1, N, 2, 8)


def test_vertical_slash_golden():
    selector = VerticalSlash(6, 8, last=8, first=2, near=4, tile=1)
    groups = dict(selector.select(Q[0], K[0], SIGHT).groups)
    assert groups[0,].columns == (0, 1, 3, 4, 15, 57) and groups[0,].offsets == (0, 1, 2, 3, 36, 45, 53, 54)
    assert groups[1,].columns == (0, 1, 4, 5, 15, 56) and groups[1,].offsets == (0, 1, 2, 3, 9, 45, 53, 54)
    mask = seen(selector)
    assert mask.sum((1, 2)).tolist() == [580, 606]
    logits = torch.einsum("qhd,khd->hqk", Q[0], K[0]) * 8**-0.5
    kept = torch.softmax(logits.masked_fill(INDEX > INDEX[:, None], -torch.inf), -1) * mask
    assert kept.sum(-1).mean(-1).tolist() == pytest.approx([0.503661, 0.544704], abs=1e-6)


def test_flex_prefill_golden(monkeypatch):
    found: list[Tensor] = []
    monkeypatch.setattr(flex_prefill, "distance", lambda a, b, own=flex_prefill.distance: found.append(own(a, b)) or found[-1])
    selector = FlexPrefill(0.9, 0.1, least=8, block=8)
    mask = tiles(seen(selector, 4 * Q), 8, 8)[0]
    assert float(found[0][0]) == pytest.approx(0.193984, abs=1e-6)
    assert int(mask.sum()) == 30
    assert places(mask[7]) == {0, 1, 2, 3, 7} and places(mask[6]) == {0, 1, 2, 3, 6} and places(mask[4]) == {0, 1, 2, 3, 4}
    plain = tiles(seen(selector), 8, 8)
    assert found[1].tolist() == pytest.approx([0.031500, 0.028447], abs=1e-6)
    assert plain.sum((1, 2)).tolist() == [30, 30]


def test_x_attention_golden():
    mask = tiles(seen(XAttention(0.9, stride=4, block=8), 4 * Q), 8, 8)[0]
    assert places(mask[7]) == {0, 1, 2, 3, 4, 6, 7}
    assert places(mask[5]) == set(range(6))
    assert int(mask.sum()) == 34


def test_sparge_golden():
    selector = Sparge(mass=0.9, block_q=16, block_k=8)
    mask = selector.select(4 * slow(0.1)[0], slow(0.2)[0], SIGHT).left.allows(INDEX, INDEX)
    assert [places(row) for row in tiles(mask, 16, 8)] == [{0}, {2, 3}, {4}, {6}]
    directions = torch.nn.functional.normalize(slow(0.1)[0, :, 0], dim=-1).unflatten(0, (4, 16)).mean(1)
    assert directions.square().sum(-1).tolist() == pytest.approx([0.812444, 0.897235, 0.821394, 0.869090], abs=1e-6)
    strict = Sparge(similarity=0.82, mass=0.9, block_q=16, block_k=8)  # the first block of queries is no longer alike
    assert places(tiles(seen(strict, 4 * slow(0.1), slow(0.2))[0], 16, 8)[0]) == {0, 1}


def test_quest_golden():
    last = Layout((((range(63, 64)),),))
    mask = seen(Quest(3, page=8), Q[:, 63:], K, Sight(Ring.alone(), last, LAYOUT, 8**-0.5, decoding=True))
    assert [places(tiles(mask[h, 63:], 1, 8)[0]) for h in (0, 1)] == [{2, 3, 7}, {0, 2, 7}]


def test_moba_golden():
    selector = Moba(3, block=8)
    mask = tiles(seen(selector)[0], 1, 8)
    assert places(mask[63]) == {2, 4, 7} and places(mask[20]) == {0, 1, 2}
    out = dense(Attention(pattern=causal() & selector.select(Q[0], K[0], SIGHT)), Q, K, V).out
    assert out[0, 63, 0, :4].tolist() == pytest.approx([0.528589, 0.682300, 0.042190, -0.724665], abs=1e-6)


def test_equal_scores_go_to_the_lower_index_and_hidden_ones_never():
    scores = torch.tensor([1.0, 2.0, 2.0 + 1e-12, -torch.inf, 2.0], dtype=torch.float64)
    assert [places(largest(scores, n)) for n in (1, 2, 3, 5)] == [{1}, {1, 2}, {1, 2, 4}, {0, 1, 2, 4}]
    assert places(largest(torch.tensor([1.0, torch.nan, 3.0]), 1)) == {1}
    assert int(within_share(torch.full((10,), 0.1, dtype=torch.float64), 0.9)) == 9


def test_a_key_that_is_not_a_number_is_not_hidden_by_the_selection():
    k = K.clone()
    k[0, 9, 0] = torch.nan
    assert bool(seen(Moba(2, block=8), Q, k)[0, 16:, 9].all())
    assert bool(seen(Representatives(1, 8, 2, 8, 1, 1), Q, k)[0, 16:, 9].all())


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda: VerticalSlash(verticals=0), r"VerticalSlash\(verticals=...\) was given 0"),
        (lambda: VerticalSlash(verticals=20), "20 verticals with the first 30 forced"),
        (lambda: FlexPrefill(gamma=1.5), "FlexPrefill was given gamma 1.5"),
        (lambda: XAttention(stride=7), "the stride must divide the block"),
        (lambda: Sparge(mass=0.0), "0 < mass <= 1"),
        (lambda: Quest(page=0), r"Quest\(page=...\) was given 0"),
        (lambda: Representatives(local=0), "local"),
        (lambda: AShape(initial=0), "initial"),
        (lambda: Moba(blocks=0), "blocks"),
        (lambda: Attention(select=causal()), "select must be a Selector.*got Causal"),
    ],
)
def test_sizes_that_cannot_be_are_refused(asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        asked()


def test_explain_and_the_oracle_do_not_select():
    with pytest.raises(Unsupported, match="explain sends nothing; leave select out"):
        explain(Q, K, V, ring=Ring.alone(), layout=LAYOUT, attention=Attention(select=Moba()))
    with pytest.raises(Unsupported, match="select=Moba"):
        dense(Attention(select=Moba()), Q, K, V)


def test_a_selection_leaves_nothing_planned_behind():
    from ringctx import ring_attention
    from ringctx.core.tiles import needs

    ring = Ring.alone()
    with torch.no_grad():
        ring_attention(Q, K, V, ring=ring, layout=LAYOUT, attention=Attention(select=Moba(2, 8)))
    assert not ring.kept and not needs.cache_info().currsize


def test_one_head_or_all_alike_share_one_mask():
    one = blocks(torch.ones(1, 8, 8).tril().bool(), 8)
    assert FlexPrefill(1.0, 0.0, 1, 8).select(Q[0], K[0], SIGHT) == one


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_built_with_the_defaults_of_its_selector(kind):
    assert selector_of(parse(f"attention: {{select: {{kind: {kind}}}}}").attention.select) == KINDS[kind]()
    assert isinstance(KINDS[kind](), Selector)


def test_a_configuration_is_read_and_layers_may_stay_dense():
    config = parse("attention: {select: {kind: quest, blocks: 5, block: 32, dense_layers: 2}}").attention.select
    asked = selecting(None, config, 4)
    assert [asked[layer].select for layer in range(4)] == [None, None, Quest(5, 32), Quest(5, 32)]
    assert selecting(None, parse("").attention.select, 4) is None
    with pytest.raises(ConfigError, match="dense_layers is 2, but the model has 2 layers"):
        selecting(None, config, 2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{kind: moba, gamma: 0.5}", "attention.select.gamma means nothing with kind moba; leave it out, or set kind to flex_prefill."),
        ("{blocks: 3}", "attention.select.blocks means nothing with kind none"),
        ("{dense_layers: 1}", "attention.select.dense_layers is 1; it counts layers"),
        ("{kind: nsa}", "attention.select.kind"),
    ],
)
def test_keys_that_a_kind_does_not_take_are_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(f"attention: {{select: {text}}}")
