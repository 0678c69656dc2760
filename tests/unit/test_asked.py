"""Patterns and scores in a configuration: the value that each means, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ringctx import Attention, ConfigError, Layout, Ring
from ringctx.asked.attention import attention_of
from ringctx.asked.layers import layers_of
from ringctx.config import dump, parse
from ringctx.core.pattern import Pattern
from ringctx.huggingface import wrap
from ringctx.methods.scores import Alibi, Softcap
from ringctx.patterns import causal, dilated, fixed, global_tokens, random_blocks, sinks, star, strided, window
from tests.tiny import tiny

PATTERNS = {
    "{kind: atrous, rate: 4}": causal() & dilated(4),
    "{kind: sparse, rate: 4}": causal() & (window(5) | dilated(4)),
    "{kind: strided, length: 6}": strided(6),
    "{kind: fixed, length: 8, summaries: 2}": fixed(8, 2),
    "{kind: longformer, window: 7, tokens: [0, 20]}": causal() & (window(7) | global_tokens([0, 20])),
    "{kind: bigbird, window: 4, tokens: [0], block: 8, random: 2, seed: 3}": (
        causal() & (window(4) | global_tokens([0]) | random_blocks(8, 2, 3))
    ),
    "{kind: star, block: 16, context: 64}": star(16, 64),
}


@pytest.mark.parametrize(("written", "meant"), PATTERNS.items(), ids=PATTERNS)
def test_a_pattern_is_read_and_narrowed(written: str, meant: Pattern) -> None:
    asked = attention_of(parse(f"attention: {{pattern: {written}}}").attention)
    assert isinstance(asked, Attention) and asked.pattern == meant
    narrowed = attention_of(parse(f"attention: {{pattern: {written}, window: 5, sinks: 1}}").attention)
    assert isinstance(narrowed, Attention) and narrowed.pattern == meant & (window(5) | sinks(1))
    config = parse(f"attention: {{pattern: {written}}}")
    assert parse(dump(config)) == config


def test_scores_are_read_and_know_the_models_heads() -> None:
    model = tiny().config
    asked = layers_of(parse("attention: {encoding: {kind: none}, scores: [{kind: softcap, cap: 30}, {kind: alibi}]}").attention, model)
    assert isinstance(asked, Attention) and asked.scores == (Softcap(30.0), Alibi.standard(model.num_attention_heads))


def test_a_model_attends_under_the_pattern_and_by_the_scores() -> None:
    model, plain = tiny(), tiny()
    ids = torch.arange(40)[None] % model.config.vocab_size
    asked = layers_of(parse("attention: {pattern: {kind: atrous, rate: 4}, scores: [{kind: alibi}]}").attention, model.config)
    context = wrap(model, Ring.alone(), asked)
    at = torch.arange(40)
    slopes = torch.tensor(Alibi.standard(model.config.num_attention_heads).slopes)
    bias = (-slopes[:, None, None] * (at[:, None] - at)).masked_fill(~(causal() & dilated(4)).allows(at, at), -torch.inf)
    with torch.no_grad():
        with context.running(Layout.contiguous(40, 1)):
            got = model(input_ids=ids, position_ids=at[None], use_cache=False).logits
        want = plain(input_ids=ids, attention_mask=bias[None].float(), use_cache=False).logits
    assert torch.allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("{pattern: {kind: atrous}}", r"attention.pattern.rate is missing; atrous needs it"),
        ("{pattern: {rate: 4}}", "attention.pattern.rate means nothing with kind causal; leave it out, or set kind to atrous, sparse"),
        ("{pattern: {kind: star, block: 4, context: 9, rate: 1}}", "rate means nothing with kind star"),
        ("{pattern: {kind: dilated, rate: 4}}", "dilated"),
        ("{scores: [{kind: softcap}]}", "attention.scores.cap is missing with kind softcap"),
        ("{scores: [{kind: alibi, cap: 3}]}", "attention.scores.cap means nothing with kind alibi"),
        ("[{layers: 0, heads: 0, scores: [{kind: alibi}]}, {}]", "differ in attention.scores"),
    ],
)
def test_what_cannot_be_is_a_sentence(written: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        layers_of(parse(f"attention: {written}").attention, tiny().config)


def test_numbers_that_cannot_be_are_refused_by_the_pattern() -> None:
    with pytest.raises(ConfigError, match="fixed"):
        attention_of(parse("attention: {pattern: {kind: fixed, length: 2, summaries: 3}}").attention)
    with pytest.raises(ConfigError, match="elementwise"):
        attention_of(parse("attention: {scores: [{kind: alibi}, {kind: softcap, cap: 3}]}").attention)
