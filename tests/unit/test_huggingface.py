"""wrap: a wrapped model says what the model itself says, for every family in the table; the rest is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

transformers = pytest.importorskip("transformers")

from ringctx.core.attention import Attention  # noqa: E402
from ringctx.core.layout import Layout  # noqa: E402
from ringctx.core.ring import Ring  # noqa: E402
from ringctx.errors import ConfigError, LayoutError, Unsupported  # noqa: E402
from ringctx.huggingface import FAMILIES, trained_of, turn, unwrap, wrap  # noqa: E402
from ringctx.methods.rotary import Rotary  # noqa: E402
from ringctx.patterns import causal, window  # noqa: E402
from ringctx.runtime.cache import KVCache  # noqa: E402
from tests.tiny import tiny  # noqa: E402

IDS = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(50)[None]
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    return model(IDS, position_ids=POSITIONS, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_wrapped_model_says_what_it_said_and_unwraps(kind):
    model = tiny(kind)
    want = logits(model)
    wrap(model, Ring.alone())
    assert_close(logits(model), want, atol=2e-5 * float(want.abs().max()), rtol=0)
    unwrap(model)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_scaled_frequencies_and_the_attention_factor_are_taken_over(rope):
    model = tiny(rope_parameters=rope)
    want = logits(model)
    wrap(model, Ring.alone())
    assert_close(logits(model), want, atol=2e-5 * float(want.abs().max()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("keep_rotated", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "phi3", "exaone4", "smollm3"])
def test_prefill_and_decode_say_what_the_whole_says(kind, keep_rotated):
    model = tiny(kind)
    want = logits(model)[:1]
    context = wrap(model, Ring.alone())
    cache, layout = KVCache(4, 0, 1, keep_rotated=keep_rotated), Layout.zigzag(40, 1)
    cache.extend(layout)
    with context.running(layout, cache):
        parts = [model(IDS[:1, :40], position_ids=POSITIONS[:, :40], use_cache=False).logits]
    for n in range(40, 50):
        cache.grow()
        with context.running(cache=cache, decoding=True):
            parts.append(model(IDS[:1, n : n + 1], position_ids=POSITIONS[:, n : n + 1], use_cache=False).logits)
    assert_close(torch.cat(parts, 1), want, atol=2e-5 * float(want.abs().max()), rtol=0)


@torch.no_grad()
def test_a_prompt_in_two_chunks_says_what_the_whole_says():
    model = tiny()
    want = logits(model)[:1]
    context, cache, parts = wrap(model, Ring.alone()), KVCache(4, 0, 1), []
    for span in (range(30), range(30, 50)):
        layout = Layout(((span,),))
        cache.extend(layout)
        with context.running(layout, cache):
            parts.append(model(IDS[:1, span], position_ids=POSITIONS[:, span], use_cache=False).logits)
    assert_close(torch.cat(parts, 1), want, atol=2e-5 * float(want.abs().max()), rtol=0)


def test_a_window_of_the_users_is_a_window_of_the_models():
    narrow, plain = tiny("mistral"), tiny("mistral", sliding_window=None)
    plain.load_state_dict(narrow.state_dict())
    want = logits(narrow)
    wrap(plain, Ring.alone(), Attention(pattern=causal() & window(16)))
    assert_close(logits(plain), want, atol=2e-5 * float(want.abs().max()), rtol=0)


def test_attention_may_differ_by_layer():
    model = tiny()
    whole = logits(model)
    wrap(model, Ring.alone(), {layer: Attention() for layer in range(3)})
    assert_close(logits(model), whole, atol=2e-5 * float(whole.abs().max()), rtol=0)
    unwrap(model)
    wrap(model, Ring.alone(), {3: Attention(pattern=causal() & window(2))})
    assert not torch.allclose(logits(model), whole, atol=1e-2)


def test_gradients_are_the_models_own():
    model = tiny()
    want = torch.autograd.grad(model(IDS, position_ids=POSITIONS).logits.square().mean(), list(model.parameters()))
    wrap(model, Ring.alone())
    got = torch.autograd.grad(model(IDS, position_ids=POSITIONS).logits.square().mean(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("Mamba2", {"num_heads": 2, "head_dim": 32, "state_size": 8, "n_groups": 1}, r"'mamba2': \S+layers.0.mixer \(Mamba2Mixer\)"),
        ("Bamba", {"mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1, "attn_layer_indices": [1]}, "BambaMixer"),
        (
            "Qwen3Next",
            {"num_experts": 2, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "layer_types": ["linear_attention"] * 2},
            "Qwen3NextGatedDeltaNet",
        ),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv"),
        ("MiniMax", {"num_local_experts": 2, "head_dim": 16}, "MiniMaxLightningAttention"),
    ],
)
def test_layers_that_carry_a_state_along_the_sequence_are_refused_by_name(kind, settings, said):
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**shape, num_key_value_heads=2, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(Unsupported, match=f"{said}.* carries a state along the sequence.*all of whose layers are attention"):
        wrap(model, Ring.alone())


def test_a_family_that_was_not_checked_is_refused_by_name():
    model = tiny()
    model.config.model_type = "falcon"
    with pytest.raises(Unsupported, match=r"type 'falcon'.*Checked types: llama, mistral, qwen2, qwen3"):
        wrap(model, Ring.alone())


def test_frequencies_that_depend_on_the_length_are_refused():
    model = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0})
    with pytest.raises(Unsupported, match="rotary type is 'dynamic'.*supported types: default, linear, llama3, yarn"):
        wrap(model, Ring.alone())


def test_longrope_of_a_checkpoint_is_refused_with_the_way_to_ask_for_it():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny("phi3", rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors})
    with pytest.raises(Unsupported, match="rotary type is 'longrope'.*its factors in attention.positions of kind longrope"):
        wrap(model, Ring.alone())


def test_a_length_dependent_table_of_one_type_of_layer_is_refused():
    rope = {"full_attention": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}}
    with pytest.raises(Unsupported, match="rotary type is 'dynamic'"):
        wrap(tiny("gemma3_text", rope_parameters=rope), Ring.alone())


def test_layers_that_see_what_comes_after_are_refused():
    with pytest.raises(Unsupported, match=r"Layers \[0, 1, 2, 3\] are not causal"):
        wrap(tiny("gemma3_text", use_bidirectional_attention=True), Ring.alone())


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"gemma3_text", "olmo3", "gpt_oss"}))
def test_what_a_family_was_trained_with_is_its_own_rotation(kind):
    model = tiny(kind)
    trained, own = trained_of(model), model.model.rotary_emb.inv_freq
    assert trained.rotary == Rotary(tuple(own.tolist()))
    assert trained.length == 256


def test_tables_that_differ_by_layer_are_not_extended_together():
    for kind in ("gemma3_text", "olmo3"):
        with pytest.raises(
            Unsupported, match=r"in each type of layer \(full_attention, sliding_attention\).*Leave attention.positions out"
        ):
            trained_of(tiny(kind))


def test_frequencies_that_were_rescaled_already_are_not_extended():
    for rope in (YARN, LLAMA3):
        with pytest.raises(Unsupported, match=f"rescaled already \\(type '{rope['rope_type']}'\\).*Leave attention.positions out"):
            trained_of(tiny(rope_parameters=rope))
    model = tiny()
    model.model.rotary_emb.inv_freq /= 2
    with pytest.raises(Unsupported, match="not the powers of its base 10000"):
        trained_of(model)


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_turning_another_way_reaches_the_layers_that_rotate_and_no_other(kind):
    model = tiny(kind)
    trained = trained_of(model)
    wrap(model, Ring.alone())
    before = logits(model)
    turn(model, Rotary(tuple(f / 2 for f in trained.rotary.frequencies), 1.5))
    after = logits(model)
    unwrap(model)
    model.model.rotary_emb.inv_freq /= 2
    model.model.rotary_emb.attention_scaling = 1.5
    want = logits(model)
    assert not torch.allclose(before, want, atol=1e-2)
    assert_close(after, want, atol=2e-5 * float(want.abs().max()), rtol=0)


def test_padding_is_refused_and_an_attention_mask_of_ones_is_not():
    model = tiny()
    want = logits(model)
    wrap(model, Ring.alone())
    mask = torch.ones_like(IDS)
    assert_close(logits(model, attention_mask=mask), want, atol=2e-5 * float(want.abs().max()), rtol=0)
    mask[0, :3] = 0
    with pytest.raises(Unsupported, match="has zeros \\(padding\\)"):
        logits(model, attention_mask=mask)


def test_a_mask_made_by_hand_is_refused():
    model = tiny()
    wrap(model, Ring.alone())
    with pytest.raises(Unsupported, match="say it as a Pattern"):
        logits(model, attention_mask=torch.zeros(2, 1, 50, 50))


def test_position_ids_that_are_not_the_indices_are_refused():
    model = tiny()
    wrap(model, Ring.alone())
    with pytest.raises(LayoutError, match=r"position ids 5, 6, 7, 8, … 54, but its tokens' indices are 0, 1, 2, 3, … 49"):
        model(IDS, position_ids=POSITIONS + 5, use_cache=False)


def test_mistakes_are_sentences():
    model = tiny()
    context = wrap(model, Ring.alone())
    with pytest.raises(ConfigError, match="wrapped already; call unwrap"):
        wrap(model, Ring.alone())
    with pytest.raises(LayoutError, match="layout is for 2 ranks, but the ring has 1"), context.running(Layout.zigzag(50, 2)):
        pass
    with pytest.raises(LayoutError, match="was given 50 tokens, but the layout gives it 40"), context.running(Layout.zigzag(40, 1)):
        logits(model)
    with pytest.raises(ConfigError, match="pass cache="), context.running(decoding=True):
        pass
    with pytest.raises(ConfigError, match=r"names layers \[7\], but the model has layers 0 to 3"):
        wrap(tiny(), Ring.alone(), {7: Attention()})
    with pytest.raises(Unsupported, match="Linear is not a transformers model"):
        wrap(torch.nn.Linear(2, 2), Ring.alone())


def test_a_rank_without_tokens_is_fed_one_that_counts_for_nothing():
    model = tiny()
    context = wrap(model, Ring.alone())
    with context.running(Layout(((),))):
        assert model(IDS[:1, :1], position_ids=POSITIONS[:, :1], use_cache=False).logits.shape == (1, 1, 97)
