"""A carry in a wrapped model and behind the configuration: prefill, in one piece or in chunks, and decode say what the definition says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from ringctx import Attention, ConfigError, Layout, Ring, Unsupported
from ringctx.asked.layers import layers_of
from ringctx.cli import main
from ringctx.config import AttentionConfig, CarryConfig, parse
from ringctx.huggingface import unwrap, wrap
from ringctx.huggingface.bounds import swings_of
from ringctx.methods.selective import Selective
from ringctx.patterns import causal, window
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.testing import dense
from tests.unit.test_branches_model import by_definition, close
from tests.unit.test_huggingface import IDS, POSITIONS, logits, tiny

KINDS = {"whole": Attention(carry=Selective()), "window": Attention(pattern=causal() & window(19), carry=Selective())}
DOCUMENT, QUESTION = "In the beginning God created the heaven and the earth. " * 3, "Who?"


def read(model: Any, context: Any, cache: KVCache, begin: int, lengths: tuple[int, ...]) -> torch.Tensor:
    """The logits of so many tokens from `begin` on, read in chunks."""
    parts = []
    for length in lengths:
        layout, span = Layout.zigzag(length, 1).shifted(begin), slice(begin, begin + length)
        cache.extend(layout)
        with context.running(layout, cache):
            parts.append(model(IDS[:1, span], position_ids=POSITIONS[:, span], use_cache=False).logits)
        begin += length
    return torch.cat(parts, 1)


def decode(model: Any, context: Any, cache: KVCache, tokens: range) -> torch.Tensor:
    """The logits of these tokens, one at a time."""
    parts = []
    for n in tokens:
        cache.grow()
        with context.running(cache=cache, decoding=True):
            parts.append(model(IDS[:1, n : n + 1], position_ids=POSITIONS[:, n : n + 1], use_cache=False).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(40,), (17, 23), (9, 1, 30)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks_and_decode_say_what_the_whole_says(kind, chunks):
    model = tiny()
    own, want = logits(model)[:1], by_definition(model, KINDS[kind])[:1]
    assert not torch.allclose(own, want, atol=1e-2)
    context, cache = wrap(model, Ring.alone(), KINDS[kind]), KVCache(4, 0, 1)
    close(torch.cat((read(model, context, cache, 0, chunks), decode(model, context, cache, range(40, 50))), 1), want)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["model", "int8"])
def test_tokens_that_are_taken_back_leave_no_trace(storage):
    model = tiny()
    context, cache = wrap(model, Ring.alone(), KINDS["whole"]), KVCache(4, 0, 1, storage=storage)
    read(model, context, cache, 0, (30,))
    mark, carried = cache.mark(), cache.carry(0)
    first = decode(model, context, cache, range(30, 40))
    assert not torch.equal(cache.carry(0)[:, :30], carried)
    cache.restore(mark)
    assert torch.equal(cache.carry(0), carried)
    assert torch.equal(decode(model, context, cache, range(30, 40)), first)


def test_without_a_cache_each_layer_says_its_memory_with_a_gradient():
    model = tiny().double()
    seen: dict[int, list[torch.Tensor]] = {}
    context = wrap(model, Ring.alone(), KINDS["whole"])
    context.asked = lambda layer, q, k, attention: seen.setdefault(layer, []).append(q)
    attend = context.attend
    context.attend = lambda layer, q, k, v, attention: (
        seen.setdefault(layer, []).append(dense(attention, q, k, v).memory) or attend(layer, q, k, v, attention)
    )
    model(IDS[:, :20], position_ids=POSITIONS[:, :20], use_cache=False)
    assert sorted(context.memories) == [0, 1, 2, 3]
    for layer, memory in context.memories.items():
        assert_close(memory.detach(), seen[layer][0])
    sum(memory.sum() for memory in context.memories.values()).backward()
    assert float(model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0
    unwrap(model)


def test_the_configuration_asks_for_it_layer_by_layer():
    model = tiny().config
    assert layers_of(AttentionConfig(carry=CarryConfig(kind="selective", tau=2.0)), model).carry == Selective(2.0)
    config = parse("attention: [{layers: 0-1, carry: {kind: selective}}, {window: 9}]")
    assert [layers_of(config.attention, model)[n].carry for n in range(4)] == [Selective(), Selective(), None, None]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention: {carry: {kind: selective, tau: 0}}", "attention.carry.tau is 0"),
        ("attention: {carry: {kind: selective}, branches: {kind: rerope, window: 9}}", "attention.branches changes that"),
        ("attention: {carry: {kind: selective}, select: {kind: quest}}", "attention.select changes that"),
        ("attention: {carry: {kind: selective}}\ncache: {recall: {blocks: 1}}", "cache.recall keeps some keys without"),
        ("attention: {carry: {kind: selective}}\ncache: {evict: {kind: streaming}}", "cache.evict.kind streaming keeps some keys without"),
        ("attention: {carry: {kind: selective}}\nlayout: {kind: striped}", "set it to zigzag or contiguous"),
        ("attention: {carry: {kind: selective}}\nmodel: {tensor_parallel: 2}", "attention.carry looks at all heads"),
    ],
)
def test_what_it_cannot_be_with_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse(text)


def test_heads_of_a_layer_cannot_differ_beside_it():
    config = parse("attention: [{layers: 0, heads: 0-1, window: 9, carry: {kind: selective}}, {carry: {kind: selective}}]")
    with pytest.raises(ConfigError, match="Heads of layer 0 differ in pattern, window or sinks"):
        layers_of(config.attention, tiny().config)


def test_a_model_with_windows_of_its_own_keeps_them():
    model = tiny("mistral")
    want = by_definition(model, KINDS["whole"])
    wrap(model, Ring.alone(), KINDS["whole"])
    close(logits(model), want)


# -- the engine ---------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("own_cache")


def engine(*overrides: str) -> Engine:
    text = "{model: {path: random-tiny, dtype: float32, device: cpu}, attention: {carry: {kind: selective}}}"
    return Engine.load(parse(text, ["generation.max_new_tokens=12", *overrides]), Ring.alone())


@pytest.mark.parametrize("overrides", [("layout.chunk=32",), ("layout.chunk=7", "cache.storage=bf16"), ("attention.window=50",)], ids=str)
def test_chunks_and_questions_do_not_change_the_answer(overrides):
    whole = engine(*(x for x in overrides if not x.startswith("layout"))).generate(DOCUMENT, QUESTION).tokens
    ours = engine(*overrides)
    assert ours.generate(DOCUMENT, QUESTION).tokens == whole
    reading = ours.read(ours.prompts.opening(DOCUMENT))
    ask = lambda question: ours.answer(reading, [*reading.tokens, *ours.prompts.ending(DOCUMENT, question)]).tokens
    assert ask("Where?") != whole
    assert ask(QUESTION) == whole


def test_it_changes_what_is_said():
    assert engine().generate(DOCUMENT, QUESTION).tokens != engine("attention.carry.kind=none").generate(DOCUMENT, QUESTION).tokens


def test_the_command_takes_it(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(DOCUMENT)
    (tmp_path / "c.yaml").write_text("{model: {path: random-tiny, dtype: float32, device: cpu}, generation: {max_new_tokens: 12}}")
    asked = ["--document", str(tmp_path / "text.txt"), "--question", QUESTION, "--json"]
    assert main(["generate", str(tmp_path / "c.yaml"), *asked, "--set", "attention.carry.kind=selective"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == engine().generate(DOCUMENT, QUESTION).tokens


def test_per_head_patterns_of_ones_own_are_refused_by_the_call():
    from ringctx.patterns import per_head

    model = tiny()
    wrap(model, Ring.alone(), Attention(pattern=per_head({causal(): (0, 1), causal() & window(9): (2, 3)}), carry=Selective()))
    with pytest.raises(Unsupported, match="differs by head"):
        logits(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_no_logit_swings_beyond_its_bound(kind):
    model = tiny(kind)
    swings = swings_of(model)
    context, found = wrap(model, Ring.alone()), []

    def attend(layer, q, k, v, attention):
        every = torch.arange(q.shape[1])
        turned = attention.encoding.queries(q, every), attention.encoding.keys(k, every).repeat_interleave(q.shape[2] // k.shape[2], 2)
        logits = torch.einsum("bqhd,bkhd->bhqk", *turned) * (attention.scale or q.shape[3] ** -0.5)
        found.append(float((logits - logits.diagonal(dim1=2, dim2=3).unsqueeze(-1)).abs().max()))
        return dense(attention, q, k, v).out.float()

    context.attend = attend
    logits(model)
    assert len(found) == len(swings) == 4
    assert all(0.02 * swing < most <= swing for most, swing in zip(found, swings, strict=True))


def test_a_family_without_such_a_bound_is_refused():
    with pytest.raises(Unsupported, match="'phi3' can be apart was not derived"):
        swings_of(tiny("phi3"))
