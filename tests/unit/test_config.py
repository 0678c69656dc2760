"""Configuration: what is read is what was written, and everything else is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringctx.config import Config, dump, load, parse
from ringctx.errors import ConfigError

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def test_an_empty_file_is_all_defaults():
    assert parse("") == Config()


def test_blocks_and_values_are_read():
    config = parse("model: {path: some/folder, dtype: float32}\nring:\n  timeout: 5\nattention: {window: 512, sinks: 4}")
    assert (config.model.path, config.model.dtype, config.ring.timeout) == ("some/folder", "float32", 5.0)
    assert (config.attention.window, config.attention.sinks) == (512, 4)


def test_what_is_dumped_is_read_back():
    config = parse("generation: {max_new_tokens: 7, stop: [a, 'b c'], prompt: 'Q {question} of {document}'}")
    assert config.generation.stop == ("a", "b c")
    assert parse(dump(config)) == config
    config = parse("attention: {positions: {kind: longrope, factor: 2, short: [1, 1.5], long: [2, 3]}}")
    assert (config.attention.positions.short, config.attention.positions.long) == ((1.0, 1.5), (2.0, 3.0))
    assert parse(dump(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_listed(path):
    load(path)
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()


def test_overrides_apply_in_turn_and_make_blocks():
    config = parse("attention: {window: 8}", ["attention.window=4096", "generation.temperature=1", "model.path=a=b"])
    assert (config.attention.window, config.generation.temperature, config.model.path) == (4096, 1.0, "a=b")


def test_an_override_can_take_a_value_away():
    assert parse("attention: {window: 8}", ["attention.window=null"]).attention.window is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ring: {tiemout: 3}", "There is no key 'ring.tiemout'; did you mean 'timeout'?"),
        ("rings: {timeout: 3}", "There is no key 'rings'; did you mean 'ring'?"),
        ("zzz: 1", "There is no key 'zzz'; the keys here are model, ring, layout, attention, cache, generation, server, training."),
        ("ring: {timeout: 3, timeout: 4}", "Line 1: the key 'timeout' is written twice; keep one."),
        ("ring: {timeout: 3}\nring: {timeout: 4}", "Line 2: the key 'ring' is written twice; keep one."),
        ("ring: {timeout: soon}", "ring.timeout is 'soon', text; it must be a number."),
        ("ring: {timeout: true}", "ring.timeout is True, true or false; it must be a number."),
        ("attention: {window: 1.5}", "attention.window is 1.5, a number; it must be a whole number or null."),
        ("model: {path: [a]}", "model.path is ['a'], a list; it must be text."),
        ("model: {dtype: bfloat61}", "model.dtype is 'bfloat61'; possible are auto, float32, bfloat16, float16. Did you mean 'bfloat16'?"),
        ("layout: zigzag", "layout must be a block of keys, not text."),
        ("- 1", "the configuration must hold blocks (model:, ring:, …), not a list."),
        ("model: {", "the configuration is not valid YAML"),
        ("1: 2", "Line 1: the key 1 is a whole number; keys are words."),
        ("attention: {window: 0}", "attention.window is 0; it must be at least 1."),
        ("attention: {positions: {kind: yran}}", "Did you mean 'yarn'?"),
        ("attention: {positions: {kind: pi}}", "attention.positions.factor is missing; pi needs at least 1, such as 4"),
        ("attention: {positions: {kind: ntk, factor: 0.5}}", "attention.positions.factor is 0.5; ntk needs at least 1"),
        ("attention: {positions: {kind: ntk, factor: .nan}}", "attention.positions.factor is nan; ntk needs at least 1"),
        (
            "attention: {positions: {factor: 4}}",
            "factor means nothing with kind none; leave it out, or set kind to pi, ntk, dynamic_ntk, yarn",
        ),
        (
            "attention: {positions: {kind: pi, factor: 4, beta_slow: 2}}",
            "beta_slow means nothing with kind pi; leave it out, or set kind to yarn",
        ),
        (
            "attention: {positions: {kind: yarn, factor: 4, beta_slow: 40}}",
            "beta_slow is 40.0 and beta_fast is 32.0; 0 < beta_slow < beta_fast.",
        ),
        (
            "attention: {positions: {kind: longrope, factor: 4, short: [1]}}",
            "longrope needs attention.positions.short and .long, each a list",
        ),
        ("attention: {positions: {short: [1, a]}}", "attention.positions.short[1] is 'a', text; it must be a number."),
        ("attention: {positions: {short: 1}}", "attention.positions.short is 1, a whole number; it must be a list of numbers."),
        ("attention: {branches: {kind: rerop, window: 4}}", "Did you mean 'rerope'?"),
        ("attention: {branches: {kind: rerope}}", "attention.branches.window is missing; rerope needs it: a number of 1 or more."),
        ("attention: {branches: {kind: self_extend, window: 4}}", "attention.branches.group is missing; self_extend needs it"),
        ("attention: {branches: {kind: leaky_rerope, window: 4, factor: .nan}}", "attention.branches.factor is nan; it must be"),
        ("attention: {branches: {kind: streaming, window: 4, sinks: 0}}", "attention.branches.sinks is 0; it must be at least 1."),
        (
            "attention: {branches: {kind: dual_chunk, chunk: 4, window: 4}}",
            "attention.branches.window means nothing with kind dual_chunk; leave it out, or set kind to rerope, leaky_rerope, self_extend",
        ),
        ("attention: {branches: {group: 4}}", "group means nothing with kind none; leave it out, or set kind to self_extend"),
        ("attention: {positions: 4}", "attention.positions must be a block of keys, not a whole number."),
        ("attention: {sinks: 4}", "attention.sinks means nothing without attention.window; set a window or leave sinks out."),
        ("ring: {timeout: 0}", "ring.timeout is 0.0; it must be at least 0.001."),
        ("cache: {page: 0}", "cache.page is 0; it must be at least 1."),
        ("generation: {stop: END}", "generation.stop is 'END', text; it must be a list of texts, written [..., ...]."),
        ("generation: {stop: [END, 3]}", "generation.stop[1] is 3, a whole number; it must be text."),
        ("generation: {stop: ['']}", "generation.stop holds an empty text, which would end every answer before it begins; leave it out."),
        ("cache: {storage: int2}", "cache.storage is 'int2'; possible are model, bf16, int8, int4, auto."),
        ("cache: {spill: 3}", "cache.spill is 3, a whole number; it must be text or null."),
        ("cache: {storage: auto}", "cache.storage auto needs cache.memory_gib: how much memory keys and values may take on each rank."),
        ("cache: {storage: auto, memory_gib: 0}", "cache.memory_gib is 0.0; it must be at least 0.001."),
        ("cache: {memory_gib: 4}", "cache.memory_gib means nothing without cache.storage: auto; set that or leave memory_gib out."),
        ("cache: {storage: int8, page: 8}", "set cache.page to at least 16, or cache.storage to model or bf16."),
        ("generation: {max_new_tokens: 0}", "generation.max_new_tokens is 0; it must be at least 1."),
        ("generation: {prompt: '{document}'}", "generation.prompt must hold {document} and {question}"),
    ],
)
def test_a_wrong_file_is_a_sentence(text, sentence):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("attention.window", "cannot be read; write --set key.sub=value"),
        ("=4", "cannot be read; write --set key.sub=value"),
        ("ring.timeout.unit=3", "ring.timeout is a value, not a block."),
        ("model.path={", "the value is not valid YAML"),
        ("ring.timout=3", "did you mean 'timeout'?"),
    ],
)
def test_a_wrong_override_is_a_sentence(override, sentence):
    with pytest.raises(ConfigError) as caught:
        parse("ring: {timeout: 3}", [override])
    assert sentence in str(caught.value)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the configuration '.*none\.yaml': No such file"):
        load(tmp_path / "none.yaml")
