"""Extend: transformers' own frequencies bit for bit, the laws of each method, and the tokens transformers generates with them."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from ringctx.config import parse  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import ConfigError, Unsupported  # noqa: E402
from ringctx.huggingface import weights  # noqa: E402
from ringctx.methods.extend import Trained, dynamic_ntk, interpolated, longrope, ntk, yarn  # noqa: E402
from ringctx.runtime.engine import Engine  # noqa: E402

TRAINED = [Trained(128, 10_000.0, 4096), Trained(64, 500_000.0, 8192), Trained(32, 1_000_000.0, 32_768), Trained(16, 10_000.0, 64)]
FACTORS = [1.0, 1.7, 3.3, 4.0, 32.0]
EVERY = [(trained, factor) for trained in TRAINED for factor in FACTORS]
LAST_BITS = 2 * torch.finfo(torch.float32).eps
"""Two float32 products and a sum, each rounded once."""

trainings = st.builds(Trained, st.integers(2, 64).map(lambda n: 2 * n), st.floats(100.0, 1e7), st.integers(32, 1 << 17))
factors = st.floats(1.0, 64.0)


def tensor(rotary) -> torch.Tensor:
    return torch.tensor(rotary.frequencies, dtype=torch.float64)


def theirs(kind: str, trained: Trained, length: int | None = None, **more) -> tuple[list[float], float]:
    """Frequencies and attention factor that transformers computes for a configuration."""
    rope = {"rope_type": kind, "rope_theta": trained.base, **more}
    shape = {"head_dim": trained.width, "max_position_embeddings": trained.length}
    config = transformers.LlamaConfig(hidden_size=4 * trained.width, num_attention_heads=4, rope_parameters=rope, **shape)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return frequencies.tolist(), scaling


def ours(rotary) -> tuple[list[float], float]:
    return list(rotary.frequencies), rotary.scaling


def tables(trained: Trained) -> dict[str, list[float]]:
    """Made-up LongRoPE tables for as many pairs as there are."""
    pairs = trained.width // 2
    return {"short": [1 + n / (3 * pairs) for n in range(pairs)], "long": [1 + 7 * n / pairs for n in range(pairs)]}


@pytest.mark.parametrize(("trained", "factor"), EVERY, ids=str)
def test_interpolation_is_transformers_linear_bit_for_bit(trained, factor):
    assert ours(interpolated(trained, factor)) == theirs("linear", trained, factor=factor)


@pytest.mark.parametrize("length", [1, 64, 65, 5000, 1_000_000])
@pytest.mark.parametrize(("trained", "factor"), EVERY, ids=str)
def test_dynamic_ntk_is_transformers_dynamic_bit_for_bit(trained, factor, length):
    assert ours(dynamic_ntk(trained, factor, length)) == theirs("dynamic", trained, length, factor=factor)


@pytest.mark.parametrize("betas", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 1.01}], ids=str)
@pytest.mark.parametrize(("trained", "factor"), EVERY, ids=str)
def test_yarn_is_transformers_yarn_bit_for_bit(trained, factor, betas):
    assert ours(yarn(trained, factor, **betas)) == theirs("yarn", trained, factor=factor, **betas)


@pytest.mark.parametrize("length", [1, 64, 65, 1_000_000])
@pytest.mark.parametrize(("trained", "factor"), EVERY, ids=str)
def test_longrope_is_transformers_longrope_bit_for_bit(trained, factor, length):
    named = {f"{name}_factor": table for name, table in tables(trained).items()}
    want = theirs("longrope", trained, length, factor=factor, original_max_position_embeddings=trained.length, **named)
    assert ours(longrope(trained, factor, length, **tables(trained))) == want


def test_yarn_gives_the_figures_of_llama_2_extended_16_times():
    rotary = yarn(Trained(128, 10_000.0, 4096), 16.0)
    got = [rotary.frequencies[j] for j in (0, 20, 32, 45, 46, 63)]
    assert [round(f, 6) for f in got] == [1.0, 0.056234, 0.005673, 0.000152, 0.000083, 0.000007]
    assert round(rotary.scaling, 6) == 1.277259


@settings(deadline=None)  # a busy machine is no failure
@given(trainings, factors)
def test_ntk_is_its_closed_form(trained, factor):
    """f_j s^(-2j/(d-2)). Float32 rounds the exponent 2j/d and the base, and pow multiplies the former's error by ln b."""
    d, got = trained.width, ntk(trained, factor)
    j = torch.arange(d // 2, dtype=torch.float64)
    want = trained.base ** (-2 * j / d) * factor ** (-2 * j / (d - 2))
    base = trained.base * factor ** (d / (d - 2))
    assert got.scaling == 1.0 and got.frequencies[0] == 1.0
    assert_close(tensor(got), want, rtol=torch.finfo(torch.float32).eps * (3 + math.log(base)), atol=0)


@settings(deadline=None)  # a busy machine is no failure
@given(trainings)
def test_a_factor_of_1_is_the_identity(trained):
    plain, ones = trained.rotary, [1.0] * (trained.width // 2)
    assert interpolated(trained, 1.0) == ntk(trained, 1.0) == plain
    assert longrope(trained, 1.0, 9, short=ones, long=ones) == longrope(trained, 1.0, 1 << 30, short=ones, long=ones) == plain
    assert yarn(trained, 1.0).scaling == 1.0
    assert_close(tensor(yarn(trained, 1.0)), tensor(plain), rtol=LAST_BITS, atol=0)


@settings(deadline=None)  # a busy machine is no failure
@given(trainings, factors, st.integers(1, 1 << 20))
def test_dynamic_ntk_is_the_identity_up_to_the_trained_length_and_ntk_beyond(trained, factor, more):
    assert dynamic_ntk(trained, factor, min(more, trained.length)) == trained.rotary
    assert dynamic_ntk(trained, 1.0, trained.length + more) == ntk(trained, (trained.length + more) / trained.length)


@settings(deadline=None)  # a busy machine is no failure
@given(trainings, factors)
def test_yarn_lies_between_the_trained_and_the_interpolated(trained, factor):
    got, kept, low = tensor(yarn(trained, factor)), tensor(trained.rotary), tensor(interpolated(trained, factor))
    assert bool((got <= kept * (1 + LAST_BITS)).all() and (got >= low * (1 - LAST_BITS)).all())


def test_yarn_leaves_all_pairs_alone_where_all_turn_fast():
    trained = Trained(16, 2.0, 1 << 20)
    assert yarn(trained, 4.0).frequencies == trained.rotary.frequencies


@settings(deadline=None)  # a busy machine is no failure
@given(trainings, factors)
def test_yarn_leaves_fast_pairs_alone_and_interpolates_slow_ones(trained, factor):
    got, kept = tensor(yarn(trained, factor)), tensor(trained.rotary)
    turns = trained.length * trained.base ** (-torch.arange(0, trained.width, 2, dtype=torch.float64) / trained.width) / (2 * math.pi)
    pairs = torch.arange(trained.width // 2)
    fast = pairs <= ((turns > 32 * 1.001).sum() - 1)
    slow = pairs >= (turns > 1 * 0.999).sum()  # the edge itself is rounded outwards
    assert torch.equal(got[fast], kept[fast])
    assert_close(got[slow], kept[slow] / factor, rtol=LAST_BITS, atol=0)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (lambda: ntk(TRAINED[0], 0.5), "extended 0.5 times; a factor is 1 or more"),
        (lambda: interpolated(TRAINED[0], math.nan), "extended nan times"),
        (lambda: dynamic_ntk(TRAINED[0], math.inf, 10), "extended inf times"),
        (lambda: yarn(TRAINED[3], 4.0, 32.0, 11.0), "no pair turns so often in the 64 tokens of training; give at most 10.2"),
        (lambda: yarn(TRAINED[0], 4.0, 1.0, 32.0), "beta_fast 1, beta_slow 32; 0 < beta_slow < beta_fast. Common: 32, 1."),
        (
            lambda: longrope(TRAINED[3], 4.0, 9, short=[1.0] * 8, long=[1.0] * 7),
            "7 long factors, 1 to 1; the model rotates 16 dims, so give 8",
        ),
        (lambda: longrope(TRAINED[3], 4.0, 9, short=[0.0] * 8, long=[1.0] * 8), "8 short factors, 0 to 0"),
        (lambda: longrope(TRAINED[3], 4.0, 9, short=[], long=[]), "0 short factors, none at all"),
        (lambda: Trained(2, 10_000.0, 64), "of 2 dims cannot be extended; it takes an even number, 4 or more"),
        (lambda: Trained(16, 1.0, 64), "base of 1.0 trained on 64 tokens cannot be"),
    ],
)
def test_a_request_that_cannot_be_is_a_sentence(asked, sentence):
    with pytest.raises(ConfigError) as caught:
        asked()
    assert sentence in str(caught.value)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The random model as if it had been trained on 64 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        shutil.copytree(weights.checkpoint("random-tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return folder


DOCUMENT, QUESTION, NEW = "In the beginning " * 9, "Who?", 24
KINDS = {
    "pi": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "default", "rope_theta": 10_000.0 * 4.0 ** (16 / 14)},
    "dynamic_ntk": {"rope_type": "default"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
        **{f"{name}_factor": table for name, table in tables(TRAINED[3]).items()},
    },
}  # fmt: skip


def engine(folder, kind: str, *overrides: str) -> Engine:
    positions = {"kind": kind, **({} if kind == "none" else {"factor": 4}), **(tables(TRAINED[3]) if kind == "longrope" else {})}
    blocks = {"model": {"path": str(folder), "dtype": "float32", "device": "cpu"}, "attention": {"positions": positions}}
    return Engine.load(parse(json.dumps(blocks), [f"generation.max_new_tokens={NEW}", *overrides]), Ring.alone())


def own_tokens(folder, prompt: list[int], rope: dict) -> list[int]:
    """What transformers generates from the same prompt with this rope in the model's own configuration."""
    config = transformers.AutoConfig.from_pretrained(folder, rope_parameters={"rope_theta": 10_000.0, **rope})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "settings"), [*((kind, ()) for kind in KINDS), ("yarn", ("cache.keep_rotated=false",))], ids=str)
def test_tokens_are_those_of_transformers_own_generate(short, kind, settings):
    """transformers has no plain NTK, and keeps keys rotated by stale dynamic frequencies: a default rope of their base stands for both."""
    made = engine(short, kind, *settings)
    prompt, rope = made.prompts.whole(DOCUMENT, QUESTION), dict(KINDS[kind])
    if kind == "dynamic_ntk":
        rope["rope_theta"] = 10_000.0 * (4 * (len(prompt) + NEW) / 64 - 3) ** (16 / 14)
    got = made.generate(DOCUMENT, QUESTION).tokens
    assert got == own_tokens(short, prompt, rope)
    assert got != own_tokens(short, prompt, {"rope_type": "default"})


def test_each_sequence_is_turned_by_its_own_length(short):
    made = engine(short, "dynamic_ntk")
    first = made.generate(DOCUMENT, QUESTION).tokens
    made.generate("A short one.", QUESTION)
    assert made.generate(DOCUMENT, QUESTION).tokens == first
    plain = engine(short, "none", "generation.max_new_tokens=4")
    brief = engine(short, "dynamic_ntk", "generation.max_new_tokens=4")
    assert brief.generate("Word", QUESTION).tokens == plain.generate("Word", QUESTION).tokens


def test_what_the_model_cannot_take_is_refused_while_loading(short, tmp_path):
    with pytest.raises(ConfigError, match="the model rotates 16 dims, so give 8 positive numbers"):
        engine(short, "longrope", "attention.positions.long=[1, 2]")
    scaled = tmp_path / "scaled"
    shutil.copytree(short, scaled)
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 10_000.0, **KINDS["yarn"]}}))
    with pytest.raises(Unsupported, match="rescaled already \\(type 'yarn'\\)"):
        engine(scaled, "pi")


@pytest.mark.parametrize(
    ("kind", "times", "said"),
    [("none", 5, "on 64; expect"), ("pi", 5, ""), ("pi", 16, "on 64 and stretched 4 times; expect"), ("dynamic_ntk", 16, "")],
)
def test_a_prompt_beyond_what_positions_reach_warns(short, caplog, kind, times, said):
    with caplog.at_level("WARNING", logger="ringctx"):
        engine(short, kind, "generation.max_new_tokens=1").generate("A long document. " * times, QUESTION)
    assert said in caplog.text
    assert bool(said) == ("expect worse" in caplog.text)
