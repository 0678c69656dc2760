"""Branches: the distances of the papers, the laws of their encodings, and every refusal's sentence."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from ringctx import Attention, ConfigError, Unsupported
from ringctx import patterns as p
from ringctx.core.branch import Branch, disjoint
from ringctx.core.layout import Layout
from ringctx.core.pattern import Pattern
from ringctx.core.rules import Chunks
from ringctx.methods.branches import (
    Branches,
    Place,
    Placed,
    always,
    dual_chunk,
    leaky_rerope,
    lm_infinite,
    rerope,
    rotated_by,
    self_extend,
    streaming,
)
from ringctx.methods.rotary import Rotary
from ringctx.testing import dense, golden_inputs

FREQUENCY = 2.0**-6
SLOW = Rotary((FREQUENCY,))
"""One pair of dims that turns by less than half a circle over the distances here, so that they can be read off it."""
ROTARY = Rotary((1.0, 0.1, 0.01), scaling=1.25)


def seen_at(branches: Branches, i: int, n: int = 40) -> dict[int, float]:
    """Key -> distance from query i, read off the angle between the two; only keys that are seen."""
    query, keys = torch.tensor([i]), torch.arange(n)
    east = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, n, 1, 2)
    angle = lambda x: torch.atan2(x[0, :, 0, 1], x[0, :, 0, 0])
    found = {}
    for branch in branches:
        turned = angle(branch.encoding.queries(east[:, :1], query)) - angle(branch.encoding.keys(east, keys))
        sees = (p.causal() & branch.pattern).allows(query, keys)[0]
        assert not found.keys() & set(keys[sees].tolist())
        found |= {j: round(float(turned[j]) / FREQUENCY, 5) for j in keys[sees].tolist()}
    return found


def row(branches: Branches, i: int) -> list[float]:
    """The distances of keys 0..i, all of which are seen."""
    found = seen_at(branches, i)
    return [found[j] for j in range(i + 1)]


def test_rerope_stops_counting_at_the_window():
    assert row(rerope(4, SLOW), 9) == [4, 4, 4, 4, 4, 4, 3, 2, 1, 0]


def test_leaky_rerope_counts_slower_beyond_the_window():
    assert row(leaky_rerope(4, 4, SLOW), 9) == [5.25, 5, 4.75, 4.5, 4.25, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("i", "want"), [(9, [6, 6, 5, 5, 4, 4, 3, 2, 1, 0]), (8, [6, 6, 5, 5, 4, 3, 2, 1, 0])])
def test_self_extend_counts_groups_beyond_the_window(i, want):
    assert row(self_extend(4, 2, SLOW), i) == want


@pytest.mark.parametrize(
    ("i", "want"),
    [
        (6, [6, 5, 4, 3, 2, 1, 0]),
        (10, [9, 8, 7, 6, 5, 4, 4, 3, 2, 1, 0]),
        (11, [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]),
        (17, [9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_dual_chunk_has_three_places_for_a_query(i, want):
    assert row(dual_chunk(6, 10, SLOW), i) == want


def test_dual_chunk_of_neighbouring_chunks_is_exact_up_to_the_difference():
    for i in range(40):
        distances = seen_at(dual_chunk(12, 16, SLOW), i)
        assert all(distances[i - d] == d for d in range(min(i + 1, 16 - 12 + 1)))


def test_lm_infinite_sees_the_first_and_the_latest_keys_at_a_capped_distance():
    assert seen_at(lm_infinite(4, 2, rotary=SLOW), 11) == {0: 4, 1: 4, 8: 3, 9: 2, 10: 1, 11: 0}
    assert seen_at(lm_infinite(4, 2, 8, SLOW), 6) == {0: 6, 1: 5, 3: 3, 4: 2, 5: 1, 6: 0}
    assert seen_at(lm_infinite(4, 2, 8, SLOW), 11) == {0: 8, 1: 8, 8: 3, 9: 2, 10: 1, 11: 0}


def test_streaming_positions_are_places_in_the_cache():
    assert seen_at(streaming(4, 2, SLOW), 11) == {0: 5, 1: 4, 8: 3, 9: 2, 10: 1, 11: 0}
    for i in range(20):
        kept = [j for j in range(i + 1) if j < 2 or i - j < 4]
        assert seen_at(streaming(4, 2, SLOW), i) == {j: len(kept) - 1 - place for place, j in enumerate(kept)}


METHODS = {
    "rerope": lambda rotary=None: rerope(4, rotary),
    "leaky_rerope": lambda rotary=None: leaky_rerope(4, 3, rotary),
    "self_extend": lambda rotary=None: self_extend(4, 2, rotary),
    "lm_infinite": lambda rotary=None: lm_infinite(4, 2, 8, rotary),
    "streaming": lambda rotary=None: streaming(4, 2, rotary),
    "dual_chunk": lambda rotary=None: dual_chunk(6, 10, rotary),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_an_encoding_are_its_transpose(name):
    """The inner product of E x with y is that of x with the gradient's way back from y."""
    indices = torch.arange(30)
    x, y = torch.randn(2, 1, 30, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for branch in METHODS[name](ROTARY):
        for there, back in ((branch.encoding.queries, branch.encoding.queries_grad), (branch.encoding.keys, branch.encoding.keys_grad)):
            torch.testing.assert_close((there(x, indices) * y).sum(), (x * back(y, indices)).sum())


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_values(name):
    made = METHODS[name](ROTARY)
    assert made == METHODS[name](ROTARY) and hash(made) == hash(METHODS[name](ROTARY)) and made != METHODS[name](SLOW)
    assert pickle.loads(pickle.dumps(made)) == made
    assert Attention(branches=made).key() == Attention(branches=METHODS[name](ROTARY)).key()
    assert Attention(branches=made).text() != Attention(branches=METHODS[name](SLOW)).text()


def logit(attention: Attention, q: Tensor, k: Tensor, i: int, j: int) -> float:
    """The logit of one pair by the definition in words: encode both for the branch that sees them, and multiply."""
    (branch,) = [b for b in attention.branches if b.pattern.allows(torch.tensor([i]), torch.tensor([j]))]
    q_ = branch.encoding.queries(q[:, i : i + 1], torch.tensor([i]))
    return float((q_ * branch.encoding.keys(k[:, j : j + 1], torch.tensor([j]))).sum()) / math.sqrt(q.shape[3])


@pytest.mark.parametrize("name", METHODS)
def test_the_oracle_is_pair_by_pair_what_the_branches_say(name):
    q, k, v, _ = golden_inputs(h=1, n=16)
    attention = Attention(branches=METHODS[name](ROTARY))
    found = dense(attention, q, k, v)
    for i in range(16):
        keys = [j for j in range(i + 1) if attention.seen.allows(torch.tensor([i]), torch.tensor([j]))]
        logits = torch.tensor([logit(attention, q, k, i, j) for j in keys], dtype=torch.float64)
        torch.testing.assert_close(found.out[0, i, 0], logits.softmax(0) @ v[0, keys, 0])
        torch.testing.assert_close(found.lse[0, i, 0], logits.logsumexp(0))


def test_near_branches_alone_are_plain_rotary():
    q, k, v, dout = golden_inputs()
    plain = dense(Attention(encoding=SLOW), q, k, v, dout=dout)
    for name, made in (("window", rerope(64, SLOW)), ("leaky", leaky_rerope(64, 2, SLOW)), ("chunk", dual_chunk(64, 99, SLOW))):
        got = dense(Attention(branches=made), q, k, v, dout=dout)
        for mine, theirs in ((got.out, plain.out), (got.dq, plain.dq), (got.dk, plain.dk)):
            torch.testing.assert_close(mine, theirs, msg=name)


def test_the_attentions_own_pattern_narrows_all_branches():
    attention = Attention(pattern=p.causal() & p.window(6), branches=rerope(4, SLOW))
    i = torch.arange(20)
    assert torch.equal(attention.seen.allows(i, i), (p.causal() & p.window(6)).allows(i, i))
    assert Attention(branches=streaming(4, 2, SLOW)).seen.allows(i, i)[11].nonzero().flatten().tolist() == [0, 1, 8, 9, 10, 11]


def test_heads_that_see_alike_in_every_branch_are_one_group():
    own = p.per_head({p.causal(): [0, 2], p.causal() & p.window(9): [1, 3]})
    other = p.per_head({p.window(3): [0, 1], p.window(4): [2, 3]})
    attention = Attention(pattern=own, branches=(Branch(other, SLOW), Branch(~other, ROTARY)))
    assert [heads for heads, _ in attention.parts(4)] == [(0,), (1,), (2,), (3,)]
    assert [heads for heads, _ in Attention(pattern=own, branches=rerope(2, SLOW)).parts(4)] == [(0, 2), (1, 3)]
    assert len(attention.patterns(4)) == 8


def test_a_balanced_layout_counts_what_the_branches_leave():
    attention = Attention(branches=streaming(300, 4, SLOW))
    assert Layout.balanced(8192, 2, attention) == Layout.balanced(8192, 2, Attention(pattern=attention.seen))


# -- disjoint ----------------------------------------------------------------------------------------------------------------------

NEAR, FIRST = p.window(4), p.sinks(2)


@pytest.mark.parametrize(
    ("left", "right", "is_said"),
    [
        (NEAR, ~NEAR, True),
        (NEAR & FIRST, p.causal() & ~NEAR, True),
        (NEAR | FIRST, ~NEAR & ~FIRST, True),
        (NEAR | FIRST, ~(NEAR | FIRST), True),
        (NEAR & FIRST, ~(NEAR & FIRST), True),
        (p.causal() & NEAR, ~(FIRST | NEAR), True),
        (p.causal() & NEAR, ~(p.causal() & NEAR) & FIRST, True),
        (NEAR, FIRST, False),
        (NEAR & FIRST, ~(NEAR & p.causal()), False),
        (NEAR | FIRST, ~NEAR, False),
        (NEAR, ~p.window(5), False),
    ],
    ids=str,
)
def test_disjoint_is_what_is_written_so(left: Pattern, right: Pattern, is_said: bool):
    assert disjoint(left, right) is disjoint(right, left) is is_said
    i = torch.arange(12)
    assert not is_said or not (left.allows(i, i) & right.allows(i, i)).any()


def test_branches_that_share_a_pair_are_refused():
    with pytest.raises(ConfigError, match=r"Branches must be disjoint.*sinks\(2\) does not exclude window\(4\).*& ~\(the earlier one\)"):
        Attention(branches=(Branch(NEAR, SLOW), Branch(FIRST, SLOW)))
    Attention(branches=(Branch(NEAR, SLOW), Branch(FIRST & ~NEAR, SLOW)))


# -- frequencies -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_frequencies_are_filled_in_kept_or_replaced(name):
    left_out, given = Attention(branches=METHODS[name]()), Attention(branches=METHODS[name](SLOW))
    assert rotated_by(left_out, ROTARY).branches == METHODS[name](ROTARY)
    assert rotated_by(given, ROTARY).branches == given.branches
    assert rotated_by(given, ROTARY, anew=True).branches == METHODS[name](ROTARY)
    still = rotated_by(left_out, None)
    assert {b.encoding for b in still.branches} == {None} and rotated_by(still, ROTARY, anew=True).branches == still.branches


class Doubled:
    """Linear, and not rotary."""

    def queries(self, q, positions):
        return 2 * q

    keys = queries_grad = keys_grad = queries


def test_an_encoding_that_is_not_rotary_takes_no_frequencies():
    attention = Attention(branches=(Branch(NEAR, Doubled()), Branch(~NEAR, SLOW)))
    assert rotated_by(attention, ROTARY).branches == attention.branches
    with pytest.raises(Unsupported, match="is not rotary, so it cannot turn by other frequencies"):
        rotated_by(attention, ROTARY, anew=True)


# -- refusals ----------------------------------------------------------------------------------------------------------------------


class OneWay:
    def queries(self, q, positions):
        return q

    keys = queries


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: rerope(0), "rerope was given W 0; write a whole number of 1 or more"),
        (lambda: rerope(2.5), "rerope was given W 2.5"),
        (lambda: leaky_rerope(4, 0.5), "leaky_rerope was given factor 0.5"),
        (lambda: leaky_rerope(4, math.nan), "leaky_rerope was given factor nan"),
        (lambda: self_extend(4, 0), "self_extend was given group 0"),
        (lambda: lm_infinite(4, 0), "lm_infinite was given num_sinks 0"),
        (lambda: lm_infinite(4, 2, 3), "length 3 below the window 4"),
        (lambda: streaming(True, 2), "streaming was given W True"),
        (lambda: dual_chunk(10, 10), "chunks of 10 and a trained length of 10; a chunk is shorter"),
        (lambda: Branch("window"), "A branch needs a Pattern.*got str"),
        (lambda: Branch(NEAR, OneWay()), "OneWay, which does not say how gradients come back"),
        (lambda: Attention(branches=(NEAR,)), "branches is a tuple of Branch"),
        (lambda: Attention(branches=rerope(4), encoding=SLOW), "leave `encoding` out"),
        (lambda: Chunks(0, 1), "chunks was given 0; its first number is a chunk's length"),
        (lambda: Chunks(3, 0), "chunks was given 0; it counts the chunk of the token itself"),
    ],
)
def test_wrong_requests_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_places_say_what_they_are():
    texts = {Place(): "index", always(7): "7", Place(period=6): "index mod 6", Place(6, period=6, cap=9): "min(9, 6 + index mod 6)"}
    texts |= {Place(2, 4): "2 + index // 4", Place(3.75, 4, whole=False): "3.75 + index / 4"}
    assert {place: str(place) for place in texts} == texts
    assert str(Branch(NEAR, Placed(SLOW, always(4)))) == "window(4) by queries at 4 and keys at index"
