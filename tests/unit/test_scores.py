"""Softcap, ALiBi and learned biases: their formulas, and their gradients against autograd, tile by tile."""

from __future__ import annotations

import math

import pytest
import torch

from ringctx.errors import ConfigError
from ringctx.methods.scores import Alibi, DistanceBias, PairBias, Softcap


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_a_softcap_bends_logits_and_knows_its_slope(cap):
    logits = (draw(50) * 40).requires_grad_()
    capped = Softcap(cap).apply(logits)
    torch.testing.assert_close(capped, cap * torch.tanh(logits / cap))
    (slope,) = torch.autograd.grad(capped.sum(), logits)
    torch.testing.assert_close(Softcap(cap).derivative(logits.detach()), slope, rtol=1e-12, atol=1e-15)
    assert Softcap(cap).apply(logits.float()).dtype == torch.float32


@pytest.mark.parametrize("cap", [0, -1.0, math.inf, math.nan])
def test_a_cap_that_is_no_cap_is_refused(cap):
    with pytest.raises(ConfigError, match="positive and finite"):
        Softcap(cap)


def test_alibi_lowers_logits_by_slope_times_distance():
    i, j = torch.tensor([3, 9]), torch.tensor([0, 3, 10])
    bias = Alibi((0.5, 0.25, 2.0)).bias(torch.tensor([2, 0]), i, j, ())
    assert bias.tolist() == [[[-6, 0, -14], [-18, -12, -2]], [[-1.5, 0, -3.5], [-4.5, -3, -0.5]]]
    assert Alibi((0.5,)).bias(torch.tensor([0]), i, j, (), dtype=torch.float32).dtype == torch.float32


def test_alibis_standard_slopes():
    assert Alibi.standard(8).slopes == tuple(2.0**-n for n in range(1, 9))
    assert Alibi.standard(2).slopes == (2.0**-4, 2.0**-8)
    assert Alibi.standard(1).slopes == (2.0**-8,)
    twelve = Alibi.standard(12).slopes
    assert twelve[:8] == Alibi.standard(8).slopes
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    with pytest.raises(ConfigError, match="at least one"):
        Alibi.standard(0)


def test_scores_without_tensors_are_equal_by_content_and_those_with_by_identity():
    assert Alibi((0.5, 1.0)) == Alibi([0.5, 1]) and hash(Alibi((0.5,))) == hash(Alibi((0.5,)))
    assert Softcap(30.0) == Softcap(30.0)
    table = draw(2, 5)
    assert DistanceBias(table) != DistanceBias(table)
    assert len({DistanceBias(table), PairBias(draw(1, 3, 3))}) == 2


def test_a_score_says_what_it_is_without_its_numbers():
    assert str(Softcap(30.0)) == "softcap(30)"
    assert str(Alibi((0.5, 0.25))) == "alibi(0.5, 0.25)"
    assert str(DistanceBias(draw(8, 255))) == "distance_bias(8, 255, float64)"
    assert str(PairBias(draw(1, 6, 6).float())) == "pair_bias(1, 6, 6, float32)"


def test_distance_bias_reads_its_middle_at_distance_zero_and_clamps():
    table = torch.arange(5.0).expand(2, 5) + torch.tensor([[0.0], [10.0]])
    i, j = torch.tensor([0, 5]), torch.tensor([0, 1, 4, 9])
    bias = DistanceBias(table).bias(torch.tensor([1]), i, j, (table,))
    assert bias.tolist() == [[[12, 11, 10, 10], [14, 14, 13, 10]]]


S, H = 23, 4
TABLES = {
    "distance": lambda heads: DistanceBias(draw(heads, 2 * 7 - 1)),
    "pair": lambda heads: PairBias(draw(heads, S, S)),
}


@pytest.mark.parametrize("into", [False, True], ids=["new", "into"])
@pytest.mark.parametrize("rows", [1, H])
@pytest.mark.parametrize("kind", TABLES)
def test_gradients_of_tiles_add_up_to_autograds(kind, rows, into):
    """Any heads, any strided indices; the tiles' parts are those of the whole."""
    score = TABLES[kind](rows)
    (table,) = score.params()
    leaf = table.clone().requires_grad_()
    weight = draw(2, H, S, S, seed=1)
    everyone, whole = torch.arange(H), torch.arange(S)
    (want,) = torch.autograd.grad((score.bias(everyone, whole, whole, (leaf,)) * weight).sum(), leaf)
    total = torch.zeros_like(table)
    for heads in (torch.tensor([0, 2]), torch.tensor([3, 1])):
        for i in (whole[::2], whole[1::2]):
            for j in (whole[:9], whole[9:]):
                part = weight[:, heads][:, :, i][..., j]
                if into:
                    assert score.grads(part, heads, i, j, (table,), into=(total,))[0] is total
                else:
                    (grad,) = score.grads(part, heads, i, j, (table,))
                    assert grad.shape == table.shape
                    total += grad
    torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", TABLES)
def test_the_given_params_are_read_not_the_held_ones(kind):
    score = TABLES[kind](H)
    (table,) = score.params()
    bias = score.bias(torch.arange(H), torch.arange(5), torch.arange(3), (table + 1,))
    torch.testing.assert_close(bias, score.bias(torch.arange(H), torch.arange(5), torch.arange(3), (table,)) + 1)


def test_alibi_wants_no_gradient():
    score = Alibi.standard(4)
    assert score.params() == () and score.grads(draw(1, 4, 2, 2), torch.arange(4), torch.arange(2), torch.arange(2), ()) == ()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Alibi(()), "one a query head"),
        (lambda: DistanceBias(draw(4, 6)), r"\(4, 6\); it is \(heads or 1, 2n-1\)"),
        (lambda: DistanceBias(draw(5)), "DistanceBias was given a table"),
        (lambda: PairBias(draw(2, 3, 4)), r"\(2, 3, 4\); it is \(heads or 1, S, S\)"),
    ],
)
def test_a_table_of_the_wrong_shape_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("score", [Alibi((1.0, 2.0)), Alibi((1.0,)), DistanceBias(draw(2, 5)), PairBias(draw(2, 3, 3))], ids=str)
def test_a_head_without_numbers_is_refused(score):
    with pytest.raises(ConfigError, match="but a query has head 2; give one row a query head"):
        score.bias(torch.tensor([0, 2]), torch.arange(2), torch.arange(2), score.params())
