"""Weights, stream and engine on one process with the random model."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch

pytest.importorskip("transformers")

from ringctx import device
from ringctx.asked.attention import attention_of
from ringctx.config import AttentionConfig, dump, parse
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface import weights
from ringctx.runtime import engine as runtime_engine
from ringctx.runtime.answer import Listener
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.runtime.stream import Stream

pytestmark = pytest.mark.usefixtures("own_cache")


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", overrides), Ring.alone())


def test_a_named_model_is_made_once_however_many_ask(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setitem(weights.NAMED, "made-up", make)
    asking = [threading.Thread(target=weights.checkpoint, args=("made-up",)) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(made) == 1
    assert weights.checkpoint("made-up") == tmp_path / "ringctx" / "made-up"
    assert sorted(p.name for p in (tmp_path / "ringctx").iterdir()) == ["made-up", "made-up.lock"]


def test_a_checkpoint_half_made_is_never_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left")

    monkeypatch.setitem(weights.NAMED, "made-up", fail)
    with pytest.raises(OSError, match="no space left"):
        weights.checkpoint("made-up")
    assert not weights.is_ready("made-up")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json; give a checkpoint folder"):
        weights.checkpoint(str(tmp_path))


def test_auto_is_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    config = parse("").model
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "has_native_bfloat16", lambda native=native: native)
        assert device.dtype_of(config, torch.device("cpu")) is dtype
    assert device.dtype_of(config, torch.device("cuda")) is torch.bfloat16
    assert device.dtype_of(parse("model: {dtype: float16}").model, torch.device("cpu")) is torch.float16


def test_streamed_pieces_are_the_answer_and_never_half_a_character():
    tokenizer = engine().tokenizer
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    for token in tokenizer("naïve 日本語 ok").input_ids:
        stream.push(token)
    assert stream.close() == "".join(pieces) == "naïve 日本語 ok"
    assert "ï" in pieces and "日" in pieces


@pytest.mark.parametrize("text", ["日本語 naïve 😀 " * 40, "In the beginning, " * 30])
def test_a_long_stream_is_the_whole_text(text):
    tokenizer = engine().tokenizer
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    for token in tokenizer(text).input_ids:
        stream.push(token)
    assert stream.close() == "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_no_text_do_not_hold_up_the_stream():
    tokenizer = engine().tokenizer
    half = tokenizer("日").input_ids[0]
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    for _ in range(200):
        stream.push(half)
    assert sum(map(len, pieces)) == 199
    assert len(stream.close()) == 200


def test_an_answer_that_ends_inside_a_character_is_still_written():
    tokenizer = engine().tokenizer
    pieces: list[str] = []
    stream = Stream(tokenizer, pieces.append)
    for token in tokenizer("a日").input_ids[:-1]:
        stream.push(token)
    assert stream.close() == "".join(pieces)
    assert "".join(pieces).startswith("a")


@pytest.mark.parametrize(
    "settings",
    [(), ("cache.keep_rotated=false",), ("cache.page=1",), ("layout.kind=striped",), ("layout.chunk=20",), ("layout.chunk=1",)],
    ids=str,
)
def test_tokens_are_those_of_transformers_own_generate(settings):
    ours = engine("generation.max_new_tokens=24", *settings)
    answer = ours.generate("In the beginning " * 9, "Who?")
    assert answer.tokens == own_tokens(ours, "In the beginning " * 9, "Who?", 24)


def test_penalised_tokens_are_those_of_transformers_own_generate():
    ours = engine("generation.max_new_tokens=24", "generation.repetition_penalty=2")
    answer = ours.generate("In the beginning " * 9, "Who?")
    assert answer.tokens == own_tokens(ours, "In the beginning " * 9, "Who?", 24, repetition_penalty=2.0)


def own_tokens(ours: Engine, document: str, question: str, num_new: int, **settings: float) -> list[int]:
    """What transformers generates from the same prompt, its own attention in place."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights.checkpoint("random-tiny"), dtype=torch.float32)
    prompt = torch.tensor([ours.prompts.whole(document, question)])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_new, do_sample=False, **settings)
    return made[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("window", [1, 7, 40])
def test_a_window_over_chunks_is_the_window_over_the_whole(window):
    settings = ("generation.max_new_tokens=8", f"attention.window={window}", "attention.sinks=2")
    answers = [engine(*settings, *more).generate("In the beginning " * 9, "Who?") for more in ((), ("layout.chunk=13",))]
    assert answers[0].tokens == answers[1].tokens


def test_a_chunk_reads_only_the_keys_that_its_window_reaches(monkeypatch):
    ours = engine("attention.window=16", "attention.sinks=2", "layout.chunk=32", "generation.max_new_tokens=1")
    read, widths = KVCache.read, []
    monkeypatch.setattr(KVCache, "read", lambda *a: (found := read(*a), widths.append(found[0].shape[1]))[0])
    ours.generate("In the beginning " * 20, "Who?")
    assert max(widths) == 32 + 15 + 2


def test_tokens_do_not_change_when_keys_and_values_lie_in_files(monkeypatch, tmp_path):
    caches = []
    monkeypatch.setattr(runtime_engine, "KVCache", lambda *given: caches.append(KVCache(*given)) or caches[-1])
    document, short = "In the beginning " * 9, "generation.max_new_tokens=24"
    in_memory = engine(short).generate(document, "Who?").tokens
    assert engine(short, f"cache.spill={tmp_path}").generate(document, "Who?").tokens == in_memory
    assert [(cache.bytes > 0, cache.mapped_bytes > 0) for cache in caches] == [(True, False), (False, True)]


@pytest.mark.parametrize("storage", ["bf16", "int8", "int4"])
def test_answers_are_made_from_keys_held_in_fewer_bytes(storage, tmp_path):
    settings = ("generation.max_new_tokens=70", f"cache.storage={storage}")
    tokens = engine(*settings).generate("In the beginning " * 9, "Who?").tokens
    assert len(tokens) == 70
    assert engine(*settings, f"cache.spill={tmp_path}").generate("In the beginning " * 9, "Who?").tokens == tokens


def test_what_auto_chose_is_said(caplog):
    with caplog.at_level("INFO", logger="ringctx"):
        engine("generation.max_new_tokens=1", "cache.storage=auto", "cache.memory_gib=1").generate("A", "B")
    assert "Keys and values are held in memory as model, the first that fits: 71 tokens on the fullest rank" in caplog.text


def test_the_listener_hears_of_everything():
    heard: list[object] = []
    listener = Listener(
        began=lambda *n: heard.append(n),
        layer=lambda n: heard.append(f"layer {n}"),
        prefilled=lambda: heard.append("prefilled"),
        text=heard.append,
    )
    answer = engine("generation.max_new_tokens=3").generate("A", "B", listener)
    layers = ["layer 0", "layer 1"]
    assert heard[:7] == [(answer.prompt_tokens - 2, 1), *layers, (2, 1), *layers, "prefilled"]
    assert "".join(str(piece) for piece in heard[7:]) == answer.answer


def test_one_answer_after_another_is_the_same_answer():
    ours = engine("generation.temperature=1.0", "generation.seed=3", "generation.max_new_tokens=12")
    assert ours.generate("A", "B").tokens == ours.generate("A", "B").tokens


def test_generation_stops_at_the_end_of_text():
    ours = engine("generation.max_new_tokens=24")
    tokens = ours.generate("A", "B").tokens
    ours.model.generation_config.eos_token_id = [tokens[5]]
    first = tokens.index(tokens[5])
    assert ours.generate("A", "B").tokens == tokens[: first + 1]


@pytest.mark.parametrize("num_signs", [1, 3])
def test_generation_stops_before_a_stop_string(num_signs):
    ours = engine("generation.max_new_tokens=48")
    whole = ours.generate("A", "B")
    stop = re.compile(f"[ -~]{{{num_signs}}}").search(whole.answer, 8)[0]
    ours.config = parse(dump(ours.config), [f"generation.stop={json.dumps(['never', stop])}"])
    pieces: list[str] = []
    answer = ours.generate("A", "B", Listener(text=pieces.append))
    assert answer.answer == "".join(pieces) == whole.answer[: whole.answer.index(stop)] != ""
    assert answer.tokens == whole.tokens[: len(answer.tokens)]
    text = [ours.tokenizer.decode(answer.tokens[:n], skip_special_tokens=True) for n in (len(answer.tokens) - 1, len(answer.tokens))]
    assert [stop in t for t in text] == [False, True]


def test_the_keys_of_the_answer_do_not_drift():
    answer = engine("generation.max_new_tokens=2").generate("A", "B")
    as_json = answer.json()
    keys = ["answer", "tokens", "prompt_tokens", "ranks", "seconds", "tokens_per_second", "bytes", "memory"]
    assert list(as_json) == keys
    assert list(as_json["seconds"]) == ["load", "prefill", "first_token", "decode"]
    assert list(as_json["tokens_per_second"]) == ["prefill", "decode"]


def test_a_window_in_the_configuration_is_a_pattern():
    assert attention_of(AttentionConfig()) is None
    seen = attention_of(AttentionConfig(window=4, sinks=1)).pattern.allows(torch.tensor([9]), torch.arange(10))
    assert seen[0].nonzero().flatten().tolist() == [0, 6, 7, 8, 9]


def test_a_prompt_beyond_the_trained_length_warns(caplog):
    ours = engine("generation.max_new_tokens=1")
    ours.model.config.max_position_embeddings = 8
    with caplog.at_level("WARNING", logger="ringctx"):
        ours.generate("A long document", "B")
    assert "the model was trained on 8; expect worse answers" in caplog.text


def test_the_prompt_is_the_template_around_the_text():
    ours = engine("generation.prompt=Read {document}. Answer {question}")
    assert ours.tokenizer.decode(ours.prompts.whole("a {question}", "b")) == "<|user|>Read a {question}. Answer b<|model|>"
    ours.tokenizer.chat_template = None
    assert ours.tokenizer.decode(ours.prompts.whole("a", "b")) == "Read a. Answer b"


def test_a_rank_other_than_0_may_be_the_one_that_makes_the_checkpoint(tmp_path):
    """transformers' own save_pretrained writes nothing there once ranks have joined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        weights.random_tiny(tmp_path / "made")
    finally:
        torch.distributed.destroy_process_group()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "made").iterdir()}


def test_decoding_reads_only_the_keys_that_the_window_reaches(monkeypatch):
    ours = engine("attention.window=16", "attention.sinks=2", "generation.max_new_tokens=5")
    read, widths = KVCache.read, []
    monkeypatch.setattr(KVCache, "read", lambda *a: (found := read(*a), widths.append(found[0].shape[1]))[0])
    ours.generate("In the beginning " * 20, "Who?")
    assert set(widths[-8:]) == {16 + 2}  # four tokens after the first, two layers
