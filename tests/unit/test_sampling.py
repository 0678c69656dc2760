"""Sampling: greedy is the likeliest token, chances are what temperature, top_k, top_p and the penalty say, seeds repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ringctx.errors import ConfigError
from ringctx.runtime.sampling import Sampler

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def test_temperature_zero_takes_the_likeliest():
    assert Sampler().choose(LOGITS) == 1


def test_temperature_divides_the_logits():
    assert_close(Sampler(temperature=2.0).probabilities(LOGITS), (LOGITS.double() / 2).softmax(-1))


def test_top_k_leaves_k_tokens():
    chances = Sampler(temperature=1.0, top_k=2).probabilities(LOGITS)
    assert chances.nonzero().flatten().tolist() == [1, 2]
    assert_close(chances[[1, 2]], LOGITS[[1, 2]].double().softmax(-1))


def test_top_k_beyond_the_vocabulary_leaves_all():
    assert (Sampler(temperature=1.0, top_k=99).probabilities(LOGITS) > 0).all()


def test_top_p_keeps_the_token_that_crosses_the_line():
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    kept = Sampler(temperature=1.0, top_p=0.6).probabilities(chances.log())
    assert_close(kept, torch.tensor([0.625, 0.375, 0.0, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_top_p_always_keeps_the_likeliest():
    assert Sampler(temperature=1.0, top_p=1e-9).choose(LOGITS) == 1


def test_the_same_seed_gives_the_same_tokens():
    samplers = [Sampler(temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    first, again, other = ([sampler.choose(LOGITS) for _ in range(50)] for sampler in samplers)
    assert first == again != other


def test_draws_follow_the_chances():
    sampler = Sampler(temperature=1.0)
    counts = torch.bincount(torch.tensor([sampler.choose(LOGITS) for _ in range(4000)]), minlength=4)
    assert_close(counts.double() / 4000, LOGITS.double().softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(st.lists(st.integers(0, 12), max_size=30), st.floats(0.25, 4.0), st.integers(0, 99))
def test_the_repetition_penalty_is_transformers_own(dtype, ids, penalty, seed):
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(penalty)
    logits = torch.randn(10, generator=torch.Generator().manual_seed(seed)).to(dtype)  # ids 10 to 12 have no logit
    before = logits.clone()
    want = processor(torch.tensor([ids], dtype=torch.int64), logits[None].float())[0]  # transformers' generate takes float32 logits
    sampler = Sampler(temperature=1.0, repetition_penalty=penalty, seen=set(ids))
    assert sampler.penalised(logits).tolist() == want.tolist()
    assert sampler.probabilities(logits).tolist() == Sampler(temperature=1.0).probabilities(want).tolist()
    assert Sampler(repetition_penalty=penalty, seen=set(ids)).choose(logits) == int(want.argmax())
    assert logits.equal(before)


@pytest.mark.parametrize(("penalty", "token"), [(1.0, 1), (1.4, 1), (1.6, 2)])
def test_a_penalised_token_gives_way_to_the_next(penalty, token):
    assert Sampler(repetition_penalty=penalty, seen={1}).choose(LOGITS) == token


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it is 0"),
        ({"top_k": -1}, "top_k is -1; it is 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it is more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5; it is more than 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it is a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf; it is a finite number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan; it is a finite number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Sampler(**settings)
