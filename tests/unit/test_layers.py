"""`attention` as a list of blocks: every head of every layer is asked for once, and everything else is a sentence."""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import pytest
import torch

from ringctx.config import AttentionConfig, LayersConfig, dump, parse
from ringctx.config_layers import by_layer, numbers_of
from ringctx.errors import ConfigError

WINDOWED = AttentionConfig(window=8, sinks=2)
WHOLE = AttentionConfig()


def layered(text: str, num_layers: int = 6, num_heads: int = 4):
    """What each layer is asked for by these blocks."""
    return by_layer(parse(f"attention:\n{text}").attention, num_layers, num_heads)


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        (5, (5,)),
        ((4, 0), (0, 4)),
        ("5", (5,)),
        ("0-3", (0, 1, 2, 3)),
        ("0-7:3", (0, 3, 6)),
        ("1-1", (1,)),
        ("9, 0-2,4-8:2", (0, 1, 2, 4, 6, 8, 9)),
        (None, None),
    ],
)
def test_numbers_are_read(written, numbers):
    assert numbers_of("layers", written) == numbers


def test_all_layers_but_the_last_have_a_window():
    found = layered("- {layers: 5}\n- {window: 8, sinks: 2}")
    assert found == {layer: (((0, 1, 2, 3), WHOLE if layer == 5 else WINDOWED),) for layer in range(6)}


def test_every_third_layer_is_whole():
    found = layered("- {layers: 0-5:3}\n- {window: 8, sinks: 2}")
    assert [parts[0][1] for parts in found.values()] == [WHOLE, WINDOWED, WINDOWED] * 2


def test_some_heads_stream_beside_whole_ones():
    found = layered("- {layers: 0-1, heads: [3, 0], window: 8, sinks: 2}\n- {layers: 4, heads: 0-3, window: 8, sinks: 2}\n-")
    assert found[0] == found[1] == (((0, 3), WINDOWED), ((1, 2), WHOLE))
    assert found[4] == (((0, 1, 2, 3), WINDOWED),)
    assert found[2] == found[3] == found[5] == (((0, 1, 2, 3), WHOLE),)


def test_heads_of_one_layer_may_have_windows_of_several_lengths_and_equal_blocks_are_one():
    found = layered(
        "- {layers: 0, heads: 0, window: 8, sinks: 2}\n- {layers: 0, heads: 1, window: 3}\n"
        "- {layers: 0, window: 8, sinks: 2}\n- {}"
    )  # fmt: skip
    assert found[0] == (((0, 2, 3), WINDOWED), ((1,), AttentionConfig(window=3)))


def test_the_order_of_blocks_is_no_matter():
    blocks = ["- {layers: 0-2, heads: 0, window: 3}\n", "- {layers: 1-3, window: 8, sinks: 2}\n", "- {}\n"]
    found = [layered("".join(order)) for order in permutations(blocks)]
    assert all(one == found[0] for one in found)
    narrow = AttentionConfig(window=3)
    assert [{block for _, block in found[0][layer]} for layer in (0, 1, 3, 4)] == [{narrow, WHOLE}, {narrow, WINDOWED}, {WINDOWED}, {WHOLE}]


def test_what_is_dumped_is_read_back_as_it_was_written():
    config = parse("attention:\n- {layers: 0-3, heads: [1], window: 4}\n- {layers: [0, 2]}\n- {positions: {kind: none}}")
    assert parse(dump(config)) == config
    assert config.attention[0] == LayersConfig(layers="0-3", heads=(1,), window=4)
    assert "layers: 0-3\n" in dump(config)


def test_one_block_stays_one_block():
    assert parse("attention: {window: 4}").attention == AttentionConfig(window=4)
    assert "\n  layers:" not in dump(parse("attention: {window: 4}"))


def test_positions_are_those_of_every_block_and_one_block_that_selects_is_enough():
    yarn = "positions: {kind: yarn, factor: 4}"
    config = parse(f"attention:\n- {{layers: 0, {yarn}}}\n- {{window: 4, {yarn}, select: {{kind: moba}}}}")
    assert config.positions.factor == 4
    assert config.selects
    assert not parse("attention: [{layers: 0}, {window: 4}]").selects


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attention: []", "attention is an empty list; write blocks with layers, or leave it out"),
        ("attention: window", "attention must be a block of keys or a list of such blocks, not text."),
        ("attention: [window]", "attention[0] must be a block of keys, not text."),
        ("attention: [{layer: 3}]", "There is no key 'attention[0].layer'; did you mean 'layers'?"),
        ("attention: {layers: 3}", "There is no key 'attention.layers'"),
        (
            "attention: [{layers: 1.5}]",
            "attention[0].layers is 1.5, a number; it must be a whole number or text or a list of whole numbers",
        ),
        ("attention: [{layers: [a]}]", "attention[0].layers[0] is 'a', text; it must be a whole number."),
        ("attention: [{}, {layers: []}]", "In attention[1]: attention.layers is an empty list; name one at least"),
        ("attention: [{layers: 1, heads: []}]", "In attention[0]: attention.heads is an empty list; name one at least"),
        ("attention: [{layers: -1}]", "attention.layers names -1; count from 0."),
        ("attention: [{layers: '0-7-9'}]", "attention.layers is '0-7-9', which cannot be read; write 5, [0, 4], 0-7 or 0-27:4"),
        ("attention: [{layers: '0-7:0'}]", "attention.layers is '0-7:0', which cannot be read"),
        ("attention: [{layers: '0,'}]", "attention.layers is '0,', which cannot be read"),
        ("attention: [{layers: 7-0}]", "attention.layers is '7-0', which ends before it begins"),
        ("attention: [{layers: '0-3, 2, 5, 5'}]", "attention.layers names 2, 5 twice; name each once."),
        ("attention: [{heads: 2}]", "attention.heads needs attention.layers: of which layers they are, for example layers: 0-27."),
        ("attention: [{}, {window: 3}]", "attention[0] and attention[1] name no layers, and only one block can have those that are left"),
        ("attention: [{layers: 0-3}, {}, {layers: '3,9'}]", "attention[0] and attention[2] have layer 3; give each layer to one block"),
        (
            "attention: [{layers: 0-3, heads: 0-1}, {layers: 2-9, heads: 1-2}]",
            "attention[0] and attention[1] have head 1 of layer 2, 3; give each head to one block.",
        ),
        (
            "attention: [{layers: 0, positions: {kind: pi, factor: 4}}, {}]",
            "say different positions, but all layers of a model turn by the same; write the same positions in every block.",
        ),
        ("attention: [{}, {layers: 0, window: 0}]", "In attention[1]: attention.window is 0; it must be at least 1."),
        ("attention: [{layers: 0, sinks: 4}]", "In attention[0]: attention.sinks means nothing without attention.window"),
        ("attention: [{branches: {kind: rerope}}]", "In attention[0]: attention.branches.window is missing"),
        ("attention: [{select: {kind: moba, dense_layers: 2}}]", "give the layers that attend to all a block of their own."),
        (
            "{attention: [{layers: 0}, {select: {kind: moba}}], model: {tensor_parallel: 2}}",
            "attention.select looks at all heads, and model.tensor_parallel leaves each rank some of them",
        ),
    ],
)
def test_a_wrong_list_is_a_sentence(text, sentence):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- {layers: 5-7}\n-", "attention[0] names layers 6, 7, but the model has layers 0 to 5; name some that it has."),
        ("- {layers: 0, heads: [1, 4]}\n-", "attention[0] names heads 4, but the model has heads 0 to 3; name some that it has."),
        ("- {layers: 0-1}\n- {layers: 3-5}", "No block of attention has layer 2, or some heads of it; add a block without layers"),
        ("- {layers: 0-5, heads: 1}", "No block of attention has layer 0, 1, 2, … 5, or some heads of it"),
        ("- {layers: 0-5}\n-", "attention[1] is left with no head of any layer, since other blocks name them all; leave it out."),
        (
            "- {layers: 2, heads: 1, branches: {kind: rerope, window: 4}}\n-",
            "Heads of layer 2 differ in attention.branches, which holds for a whole layer; heads may differ in pattern, window and sinks.",
        ),
        ("- {layers: 2, heads: 1, select: {kind: moba}}\n-", "Heads of layer 2 differ in attention.select"),
    ],
)
def test_what_a_model_has_not_is_a_sentence(text, sentence):
    with pytest.raises(ConfigError) as caught:
        layered(text)
    assert sentence in str(caught.value)


def test_an_override_sets_a_list_as_a_whole():
    blocks = "attention: [{layers: 0}, {window: 4}]"
    with pytest.raises(ConfigError, match=r"attention is a list; set the whole of it \(--set 'attention=\[\.\.\.\]'\), or change it"):
        parse(blocks, ["attention.window=8"])
    assert parse(blocks, ["attention=[{layers: 0-2:2}, {window: 8}]"]).attention[1].window == 8
    assert parse(blocks, ["attention={window: 8}", "attention.sinks=2"]).attention == WINDOWED
    with pytest.raises(ConfigError, match="generation.stop is a list; set the whole of it"):
        parse("generation: {stop: [a]}", ["generation.stop.first=b"])


# -- a model ----------------------------------------------------------------------------------------------------------------------

pytest.importorskip("transformers")

from ringctx.asked.layers import layers_of  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import Unsupported  # noqa: E402
from ringctx.patterns import causal, per_head, sinks, window  # noqa: E402
from ringctx.runtime.answer import Folders  # noqa: E402
from ringctx.runtime.engine import Engine  # noqa: E402
from ringctx.runtime.losses import token_losses  # noqa: E402
from ringctx.tools.eval.density import density  # noqa: E402
from tests.tiny import tiny  # noqa: E402

STREAMED = causal() & (window(8) | sinks(2))
TEXT = "In the beginning God created the heaven and the earth. " * 3


def engine(attention: str, *overrides: str) -> Engine:
    """Two layers of four query heads."""
    text = f"{{model: {{path: random-tiny, dtype: float32, device: cpu}}, attention: {attention}}}"
    return Engine.load(parse(text, ["generation.max_new_tokens=12", *overrides]), Ring.alone())


def test_blocks_are_what_wrap_takes_and_layers_that_ask_the_same_share_one_value():
    config = parse(
        "attention:\n- {layers: 0-2:2, heads: 1-2, window: 8, sinks: 2}\n- {layers: 3, branches: {kind: rerope, window: 4}, window: 9}\n"
        "- {select: {kind: a_shape}}\n- {layers: 0-2:2}"
    )
    asked = layers_of(config.attention, tiny().config)
    assert asked[0].pattern == per_head({STREAMED: [1, 2], causal(): [0, 3]})
    assert asked[0] is asked[2]
    assert (asked[1].pattern, asked[1].select is not None, asked[0].select) == (causal(), True, None)
    assert (asked[3].pattern, len(asked[3].branches)) == (causal() & window(9), 2)


@pytest.mark.usefixtures("own_cache")
def test_density_counts_layers_and_heads_each_by_its_own_block():
    ours = engine("[{layers: 0, heads: 1, window: 8, sinks: 2}, {layers: 1, heads: 1-3, window: 8, sinks: 2}, {}]", "layout.chunk=30")
    token_losses(ours, list(range(1, 101)))
    indices = torch.arange(100)
    narrow = int(STREAMED.allows(indices, indices).sum())
    assert density(ours) == pytest.approx((4 * narrow + 4 * 5050) / (8 * 5050))


@pytest.mark.usefixtures("own_cache")
def test_a_selector_in_the_last_layer_is_one_after_dense_layers():
    found = []
    for attention in (
        "[{layers: 0}, {select: {kind: moba, block: 8, blocks: 2}}]",
        "{select: {kind: moba, block: 8, blocks: 2, dense_layers: 1}}",
    ):
        ours = engine(attention, "layout.chunk=40")
        found.append((ours.generate(TEXT, "Who?").tokens, density(ours)))
    assert found[0] == found[1]
    assert 0.5 < found[0][1] < 0.8  # all of one layer, some of the other


@pytest.mark.usefixtures("own_cache")
def test_equal_blocks_for_all_layers_say_what_one_block_says():
    want = engine("{window: 8, sinks: 2}").generate(TEXT, "Who?").tokens
    assert engine("[{layers: 0, window: 8, sinks: 2}, {window: 8, sinks: 2}]").generate(TEXT, "Who?").tokens == want
    assert engine("[{layers: 0, window: 8, sinks: 2}, {}]").generate(TEXT, "Who?").tokens != want


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("evict", ["{kind: h2o, heavy: 999}", "{kind: snapkv, keys: 999}"])
def test_a_policy_that_drops_nothing_leaves_blocks_as_they_are(evict):
    blocks = "[{layers: 0, heads: 0-2, window: 8, sinks: 2}, {}]"
    want = engine(blocks).generate(TEXT, "Who?").tokens
    assert engine(blocks, f"cache.evict={evict}", "cache.evict.each_chunk=true", "layout.chunk=40").generate(TEXT, "Who?").tokens == want


@pytest.mark.usefixtures("own_cache")
def test_evicted_heads_are_seen_through_the_windows_of_their_own():
    """Streaming heads whose cache is cut to the very keys that their blocks let them see."""
    blocks = "[{layers: 1, heads: 2-3, window: 8, sinks: 2}, {}]"  # both query heads of key head 1
    want = engine(blocks).generate(TEXT, "Who?").tokens
    cut = "cache.evict={kind: duo, sinks: 2, recent: 8, streaming: ['1.1']}"
    assert engine(blocks, cut).generate(TEXT, "Who?").tokens == want != engine("{}").generate(TEXT, "Who?").tokens


@pytest.mark.usefixtures("own_cache")
def test_positions_of_a_list_turn_every_layer():
    yarn = "positions: {kind: pi, factor: 4}"
    want = engine(f"{{window: 8, {yarn}}}").generate(TEXT, "Who?").tokens
    got = engine(f"[{{layers: 0, window: 8, {yarn}}}, {{window: 8, {yarn}}}]").generate(TEXT, "Who?").tokens
    assert got == want != engine("{window: 8}").generate(TEXT, "Who?").tokens


@pytest.mark.usefixtures("own_cache")
def test_a_snapshot_goes_on_where_every_layer_is_asked_the_same_however_it_is_written(tmp_path):
    chunked = ("layout.chunk=32", "cache.save_every=32")
    blocks = "[{layers: 0, heads: 0-1, window: 8, sinks: 2}, {layers: 0, heads: 2, window: 8, sinks: 2}, {}]"
    want = engine(blocks, *chunked).generate(TEXT, "Who?", None, Folders(save=tmp_path / "a")).tokens
    same = "[{layers: 1}, {layers: 0, heads: 3}, {layers: [0], window: 8, sinks: 2}]"
    assert engine(same, *chunked).generate(TEXT, "Who?", None, Folders(resume=tmp_path / "a")).tokens == want
    for other in ("[{layers: 1, heads: 0-2, window: 8, sinks: 2}, {}]", "[{layers: 0, heads: 0-2, window: 9, sinks: 2}, {}]", "{}"):
        with pytest.raises(ConfigError, match="was made from other blocks of attention for its layers; give what it was made from"):
            engine(other, *chunked).generate(TEXT, "Who?", None, Folders(resume=tmp_path / "a"))


@pytest.mark.usefixtures("own_cache")
def test_a_model_without_such_layers_is_refused_when_it_is_loaded():
    with pytest.raises(ConfigError, match="names layers 2, but the model has layers 0 to 1"):
        engine("[{layers: 2}, {}]")


@pytest.mark.usefixtures("own_cache")
def test_keys_that_were_evicted_are_not_attended_by_branches_of_a_layer():
    branched = "[{layers: 1, branches: {kind: rerope, window: 4}}, {}]"
    with pytest.raises(Unsupported, match="branches=...\\); leave that out, or evict nothing"):
        engine(branched, "cache.evict={kind: h2o, heavy: 4, recent: 8}").generate(TEXT, "Who?")


def test_the_blocks_that_the_documentation_shows_are_read():
    page = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
    last, fourth, unturned, big_bird, duo, pruned = (parse(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.S))
    assert big_bird.attention.pattern.kind == "bigbird" and [score.kind for score in big_bird.attention.scores] == ["alibi"]
    last, fourth, unturned, duo = (by_layer(config.attention, 30, 9) for config in (last, fourth, unturned, duo))
    assert pruned.cache.evict.budgets == (64,) and pruned.carries
    windowed = AttentionConfig(window=1024, sinks=4)
    assert [parts[0][1] == WHOLE for parts in last.values()] == [False] * 29 + [True]
    assert [layer for layer, parts in fourth.items() if parts[0][1] == WHOLE] == [*range(0, 30, 4)]
    encodings = [parts[0][1].encoding for parts in unturned.values()]
    assert [one.kind for one in encodings] == ["rotary"] * 29 + ["none"] and encodings[-1].log_n == 512
    assert duo[0] == (((0, 1, 2, 3, 4, 5), windowed), ((6, 7, 8), WHOLE))
    assert duo[2] == (((0, 1, 2, 6, 7, 8), windowed), ((3, 4, 5), WHOLE))
    assert duo[4] == ((tuple(range(9)), WHOLE),)
