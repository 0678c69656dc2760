"""Branches in a wrapped model and behind the configuration: prefill, in one piece or in chunks, and decode say what the definition says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx.asked.attention import attention_of
from ringctx.config import AttentionConfig, BranchesConfig, parse
from ringctx.core.attention import Attention
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface import turn, unwrap, wrap
from ringctx.huggingface.families import attention_modules
from ringctx.methods.branches import dual_chunk, rerope, streaming
from ringctx.methods.rotary import Rotary
from ringctx.patterns import causal, window
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.testing import dense
from tests.unit.test_huggingface import IDS, POSITIONS, logits, tiny

KINDS: dict[str, dict[str, Any]] = {
    "rerope": {"window": 9},
    "leaky_rerope": {"window": 9, "factor": 3.0},
    "self_extend": {"window": 9, "group": 4},
    "lm_infinite": {"window": 9, "sinks": 3, "length": 12},
    "streaming": {"window": 9, "sinks": 3},
    "dual_chunk": {"chunk": 9, "length": 12},
}


def asked(kind: str) -> Attention:
    """What the configuration says of a kind."""
    attention = attention_of(AttentionConfig(branches=BranchesConfig(kind=kind, **KINDS[kind])))
    assert attention is not None
    return attention


def by_definition(model: Any, attention: Attention) -> Tensor:
    """The model's logits with every attention computed by the oracle in float64."""
    context = wrap(model, Ring.alone(), attention)
    context.attend = lambda layer, q, k, v, attention: dense(attention, q, k, v).out.float()
    found = logits(model)
    unwrap(model)
    return found


def asked_of(model: Any) -> list[Attention]:
    """What each layer of a wrapped model was asked for."""
    return [module.ringctx.asked for module in attention_modules(model)]


def close(got: Tensor, want: Tensor) -> None:
    assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("model", ["llama", "mistral", "smollm3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_attends_by_the_branches(kind, model):
    made = tiny(model)
    own = logits(made)
    want = by_definition(made, asked(kind))
    wrap(made, Ring.alone(), asked(kind))
    close(logits(made), want)
    assert not torch.allclose(own, want, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(40,), (17, 23), (9, 1, 30)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks_and_decode_say_what_the_whole_says(kind, chunks):
    model = tiny()
    want = by_definition(model, asked(kind))[:1]
    context, cache, parts, at = wrap(model, Ring.alone(), asked(kind)), KVCache(4, 0, 1), [], 0
    for length in chunks:
        layout, span = Layout.zigzag(length, 1).shifted(at), slice(at, at + length)
        cache.extend(layout)
        with context.running(layout, cache):
            parts.append(model(IDS[:1, span], position_ids=POSITIONS[:, span], use_cache=False).logits)
        at += length
    for n in range(40, 50):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            parts.append(model(IDS[:1, n : n + 1], position_ids=POSITIONS[:, n : n + 1], use_cache=False).logits)
    close(torch.cat(parts, 1), want)


def test_distances_that_stay_as_they_are_leave_the_model_as_it_is():
    model = tiny()
    want = logits(model)
    for branches in (rerope(50), dual_chunk(50, 60), streaming(50, 1)):
        wrap(model, Ring.alone(), Attention(branches=branches))
        close(logits(model), want)
        unwrap(model)


def test_branches_turn_by_the_models_own_frequencies_unless_they_have_some():
    model = tiny("smollm3")
    own = Rotary(tuple(model.model.rotary_emb.inv_freq.tolist()))
    given = rerope(9, Rotary((0.5,) * 8))
    wrap(model, Ring.alone(), {0: Attention(branches=given), 1: asked("rerope"), 3: asked("rerope")})
    filled = asked_of(model)
    assert filled[0].branches == given
    assert filled[1].branches == rerope(9, own)
    assert [b.encoding for b in filled[3].branches] == [None, None]  # a layer without rotation
    turn(model, Rotary((0.25,) * 8, 1.5))
    turned = asked_of(model)
    assert turned[0].branches == turned[1].branches == rerope(9, Rotary((0.25,) * 8, 1.5))
    assert turned[2].encoding == Rotary((0.25,) * 8, 1.5)
    assert [b.encoding for b in turned[3].branches] == [None, None]


def test_layers_that_are_asked_the_same_share_one_table_of_angles():
    model = tiny()
    wrap(model, Ring.alone(), asked("rerope"))
    assert len({id(attention) for attention in asked_of(model)}) == 1
    turn(model, Rotary((0.25,) * 8))
    assert len({id(attention) for attention in asked_of(model)}) == 1


def test_a_window_of_the_models_narrows_the_branches():
    narrow, plain = tiny("mistral"), tiny("mistral", sliding_window=None)
    plain.load_state_dict(narrow.state_dict())
    want = by_definition(plain, Attention(pattern=causal() & window(16), branches=rerope(9)))
    wrap(narrow, Ring.alone(), asked("rerope"))
    close(logits(narrow), want)


# -- the configuration -------------------------------------------------------------------------------------------------------------


def test_window_and_sinks_of_the_configuration_narrow_the_branches():
    attention = attention_of(AttentionConfig(window=4, sinks=1, branches=BranchesConfig(kind="rerope", window=2)))
    assert attention is not None and len(attention.branches) == 2
    assert attention.seen.allows(torch.tensor([9]), torch.arange(10))[0].nonzero().flatten().tolist() == [0, 6, 7, 8, 9]


def test_the_trained_length_is_the_models_where_it_is_left_out():
    config = AttentionConfig(branches=BranchesConfig(kind="dual_chunk", chunk=9))
    attention = attention_of(config, 12)
    assert attention is not None and attention.branches == dual_chunk(9, 12)
    with pytest.raises(ConfigError, match="does not say how many tokens it was trained on; set attention.branches.length"):
        attention_of(config)
    with pytest.raises(ConfigError, match="chunks of 9 and a trained length of 8"):
        attention_of(config, 8)


def engine(kind: str, *overrides: str) -> Engine:
    model = {"path": "random-tiny", "dtype": "float32", "device": "cpu"}
    blocks = {"model": model, "attention": {"branches": {"kind": kind, **KINDS[kind]}}}
    return Engine.load(parse(json.dumps(blocks), ["generation.max_new_tokens=12", *overrides]), Ring.alone())


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_reads_in_chunks_and_holds_keys_as_it_likes(kind):
    document = "In the beginning " * 9
    want = engine(kind).generate(document, "Who?").tokens
    assert engine(kind, "layout.chunk=31", "cache.keep_rotated=false", "cache.page=16").generate(document, "Who?").tokens == want


@pytest.mark.usefixtures("own_cache")
def test_positions_and_branches_go_together(caplog):
    stretched = engine("rerope", "attention.positions={kind: pi, factor: 4}")
    with caplog.at_level("WARNING", logger="ringctx"):
        tokens = stretched.generate("In the beginning " * 40, "Who?").tokens
    assert "expect worse" not in caplog.text
    assert tokens != engine("rerope").generate("In the beginning " * 40, "Who?").tokens
