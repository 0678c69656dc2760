"""Snapshots: what was read is there after a crash at any time, for any number of ranks, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
from safetensors.torch import load_file

from ringctx.cli import main
from ringctx.config import parse
from ringctx.core.layout import Layout
from ringctx.core.ring import Ring
from ringctx.errors import ConfigError
from ringctx.huggingface import weights
from ringctx.runtime import snapshot
from ringctx.runtime.answer import Answer, Folders, Listener
from ringctx.runtime.cache import KVCache
from ringctx.runtime.engine import Engine
from ringctx.runtime.snapshot import Snapshot

DOCUMENT, QUESTION = "In the beginning God created the heaven and the earth. " * 3, "Who?"
CHUNKED = ("generation.max_new_tokens=12", "layout.chunk=32", "cache.save_every=32")
TOKENS = 168
"""Of the document; the question has 5 more."""
SOURCE = {"model": "a digest", "cache.storage": "model"}
CPU = torch.device("cpu")


class Crash(Exception):
    """What a run dies of here."""


pytestmark = pytest.mark.usefixtures("own_cache")


def engine(*overrides: str) -> Engine:
    return Engine.load(parse("model: {path: random-tiny, dtype: float32, device: cpu}", [*CHUNKED, *overrides]), Ring.alone())


def ask(ours: Engine, save: Path | None = None, resume: Path | None = None, listener: Listener | None = None) -> Answer:
    return ours.generate(DOCUMENT, QUESTION, listener, Folders(save=save, resume=resume))


def crash_in_chunk(number: int) -> Listener:
    """A listener that breaks the run off in the last layer of this chunk, counted from 0."""
    layers: list[int] = []

    def heard(layer: int) -> None:
        layers.append(layer)
        if len(layers) == 2 * number + 2:
            raise Crash

    return Listener(layer=heard)


def listed(folder: Path) -> dict:
    return json.loads((folder / snapshot.NAME).read_text())


def num_chunks_read(ours: Engine, resume: Path, save: Path | None = None) -> tuple[int, list[int]]:
    """How many chunks a resumed run reads, and its tokens."""
    began: list[tuple[int, int]] = []
    answer = ask(ours, save, resume, Listener(began=lambda *n: began.append(n)))
    return began[0][1], answer.tokens


@pytest.mark.parametrize(
    "setting",
    [
        "layout.kind=zigzag",
        "layout.kind=striped",
        "cache.storage=bf16",
        "cache.save_every=70",
        "attention.window=40",
        "attention.carry.kind=selective",
    ],
)
def test_a_whole_snapshot_gives_the_same_tokens_after_reading_the_question_alone(setting, tmp_path):
    ours = engine(setting)
    uninterrupted = ask(ours).tokens
    assert ask(ours, save=tmp_path).tokens == uninterrupted
    assert listed(tmp_path)["read"] == TOKENS
    assert num_chunks_read(ours, tmp_path) == (1, uninterrupted)


def test_keys_that_a_snapshot_gave_back_are_those_that_were_saved_bit_by_bit(tmp_path):
    ours = engine()
    tokens = ours.prompts.opening(DOCUMENT)
    first = ours.read(tokens, folders=Folders(save=tmp_path))
    second = ours.read(tokens, folders=Folders(resume=tmp_path))
    assert (first.num_resumed, second.num_resumed) == (0, TOKENS)
    assert first.cache.layout == second.cache.layout
    for layer in range(2):
        assert all(map(torch.equal, first.cache.read(layer), second.cache.read(layer)))


@pytest.mark.parametrize("setting", ["attention.carry.kind=none", "attention.carry.kind=selective"])
def test_a_run_that_broke_off_goes_on_where_it_was(setting, tmp_path):
    ours = engine(setting)
    uninterrupted = ask(ours).tokens
    with pytest.raises(Crash):
        ask(ours, save=tmp_path, listener=crash_in_chunk(2))
    assert listed(tmp_path)["read"] == 64
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.safetensors")}
    assert num_chunks_read(ours, tmp_path, save=tmp_path) == (4, uninterrupted)
    assert listed(tmp_path)["read"] == TOKENS
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before  # added to, never changed
    assert num_chunks_read(ours, tmp_path) == (1, uninterrupted)


def test_a_resumed_run_may_save_in_another_folder(tmp_path):
    ours = engine()
    with pytest.raises(Crash):
        ask(ours, save=tmp_path / "a", listener=crash_in_chunk(2))
    old = (tmp_path / "a" / snapshot.NAME).read_bytes()
    _, tokens = num_chunks_read(ours, tmp_path / "a", save=tmp_path / "b")
    assert (tmp_path / "a" / snapshot.NAME).read_bytes() == old
    assert num_chunks_read(ours, tmp_path / "b") == (1, tokens)


@pytest.mark.parametrize("put", [3, 4])
def test_a_crash_between_parts_and_their_list_leaves_the_older_snapshot(put, tmp_path, monkeypatch):
    """Files are put in place in turn: part, list, part, list, … The crash comes at the 4th, or in the midst of the 3rd."""
    ours, real, names = engine(), snapshot._put, []

    def crash(path, write):
        names.append(path.name)
        if len(names) == put:
            path.with_name(path.name + ".draft").write_bytes(b"half of it")
            raise Crash
        real(path, write)

    monkeypatch.setattr(snapshot, "_put", crash)
    with pytest.raises(Crash):
        ask(ours, save=tmp_path)
    monkeypatch.undo()
    assert names[-1] == {3: "part-32-64-rank0.safetensors", 4: "snapshot.json"}[put]
    assert listed(tmp_path)["read"] == 32
    assert num_chunks_read(ours, tmp_path, save=tmp_path) == (5, ask(ours).tokens)
    assert num_chunks_read(ours, tmp_path)[0] == 1


@pytest.mark.parametrize("name", ["part-0-32-rank0.safetensors", "part-160-168-rank0.safetensors", "snapshot.json"])
@pytest.mark.parametrize("place", [0, 0.3, 0.999])
def test_a_flipped_byte_is_named(name, place, tmp_path):
    ours = engine("generation.max_new_tokens=1")
    ask(ours, save=tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"^{name} of the snapshot in .* is damaged: its SHA-256"):
        ask(ours, resume=tmp_path)


def test_every_byte_of_the_list_counts(tmp_path):
    Snapshot.new(tmp_path, SOURCE, Ring.alone(), CPU).save(filled(Layout.zigzag(5, 1), 0))
    data = (tmp_path / snapshot.NAME).read_bytes()
    for place in range(len(data)):
        (tmp_path / snapshot.NAME).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ConfigError, match="snapshot.json of the snapshot in"):
            snapshot._listed(tmp_path)


def test_a_part_that_is_gone_is_named(tmp_path):
    ours = engine("generation.max_new_tokens=1")
    ask(ours, save=tmp_path)
    (tmp_path / "part-32-64-rank0.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks part-32-64-rank0\.safetensors; bring the file back"):
        ask(ours, resume=tmp_path)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("layout.chunk=16", r"was made from layout\.chunk 32 \(here it is 16\); give what"),
        ("layout.kind=striped", r"layout\.kind zigzag \(here it is striped\)"),
        ("attention.window=9", r"attention\.window null \(here it is 9\)"),
        ("attention.branches={kind: rerope, window: 9}", r"attention\.branches null \(here it is \{'kind': 'rerope', 'window': 9"),
        ("attention.positions={kind: yarn, factor: 2}", r"attention\.positions \{'kind': 'none'"),
        ("cache.storage=int8", r"cache\.storage model \(here it is int8\)"),
        ("model.dtype=bfloat16", r"was made from model\.dtype float32 \(here it is bfloat16\); give"),
        ("generation.prompt='{question} {document}'", r"was made from another document or generation\.prompt; give"),
    ],
)
def test_settings_that_change_the_keys_are_refused(setting, sentence, tmp_path):
    ask(engine("generation.max_new_tokens=1"), save=tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        ask(engine("generation.max_new_tokens=1", setting), resume=tmp_path)


def test_the_answer_may_be_asked_for_otherwise_unless_positions_turn_by_its_length(tmp_path):
    longer = "generation.max_new_tokens=3"
    ask(engine("generation.max_new_tokens=1"), save=tmp_path / "a")
    assert len(ask(engine(longer), resume=tmp_path / "a").tokens) == 3
    stretched = "attention.positions={kind: dynamic_ntk, factor: 2}"
    ask(engine("generation.max_new_tokens=1", stretched), save=tmp_path / "b")
    with pytest.raises(ConfigError, match=r"made from a length in tokens of 174 \(here it is 176\)"):
        ask(engine(longer, stretched), resume=tmp_path / "b")


def test_another_text_or_model_is_refused_and_the_same_model_elsewhere_is_not(tmp_path):
    ours = engine("generation.max_new_tokens=1")
    ask(ours, save=tmp_path)
    with pytest.raises(ConfigError, match="was made from another document or"):
        ours.generate("Or " + DOCUMENT, QUESTION, folders=Folders(resume=tmp_path))
    assert ours.generate(DOCUMENT, "When?", folders=Folders(resume=tmp_path)).tokens == ours.generate(DOCUMENT, "When?").tokens
    elsewhere = tmp_path / "elsewhere"
    weights.random_tiny(elsewhere)
    there = engine("generation.max_new_tokens=1", f"model.path={elsewhere}")
    ask(there, resume=tmp_path)
    next(iter(there.model.parameters())).data[0, 0] += 1
    with pytest.raises(ConfigError, match="was made from another model; give"):
        ask(there, resume=tmp_path)


def test_folders_that_cannot_serve_are_refused(tmp_path):
    ours = engine("generation.max_new_tokens=1")
    with pytest.raises(ConfigError, match=r"There is no snapshot in .* \(snapshot.json: No such file or directory\); make one with --save"):
        ask(ours, resume=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="No snapshot can be saved in .*: Not a directory"):
        ask(ours, save=tmp_path / "file" / "under")
    ask(ours, save=tmp_path)
    with pytest.raises(ConfigError, match="holds a snapshot already; go on with --resume"):
        ask(ours, save=tmp_path)


def test_a_part_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "part-0-32-rank0.safetensors").mkdir()
    with pytest.raises(ConfigError, match="The snapshot in .* cannot be written: Is a directory"):
        ask(engine(), save=tmp_path)


def test_quantised_keys_are_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="cache.storage is int4, which would be rounded again"):
        ask(engine("cache.storage=int4"), save=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_document_of_one_chunk_is_not_read_again(tmp_path):
    ours = engine("layout.chunk=null")
    tokens = ask(ours, save=tmp_path).tokens
    heard: list[tuple[int, int]] = []
    assert ask(ours, resume=tmp_path, listener=Listener(began=lambda *n: heard.append(n))).tokens == tokens
    assert heard == [(5, 1)]


def test_the_command_takes_both_folders(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENT)
    tiny = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
    command = ["generate", tiny, "--document", str(text), "--question", QUESTION, "--json", "--set", "layout.chunk=64"]
    assert main([*command, "--save", str(tmp_path / "snapshot")]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*command, "--resume", str(tmp_path / "snapshot"), "--save", str(tmp_path / "copy")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == first["tokens"]
    assert main([*command, "--resume", str(tmp_path / "none")]) == 2
    assert "There is no snapshot in" in capsys.readouterr().err


# -- other numbers of ranks, without processes: each rank saves and loads by itself ------------------------------------


def filled(layout: Layout, rank: int, cache: KVCache | None = None) -> KVCache:
    """A cache whose keys (1 n 2 4) tell which index and layer they are of."""
    cache = cache or KVCache(3, rank, layout.size)
    cache.extend(layout)
    for layer in range(3):
        keys = layout.indices(rank).double()[None, :, None, None] + torch.full((1, 1, 2, 4), 1000.0 * layer)
        cache.append(layer, keys, -keys)
    return cache


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["zigzag", "contiguous", "striped"]),
    st.lists(st.integers(1, 23), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 5),
    st.data(),
)
def test_what_some_ranks_saved_any_number_of_ranks_loads(tmp_path_factory, kind, lengths, num_savers, num_loaders, data):
    def chunks(size: int) -> list[Layout]:
        edges = [sum(lengths[:n]) for n in range(len(lengths))]
        return [getattr(Layout, kind)(length, size).shifted(a) for a, length in zip(edges, lengths, strict=True)]

    saves = [data.draw(st.booleans()) for _ in lengths[:-1]] + [True]
    folder = tmp_path_factory.mktemp("snapshot")
    savers = [Snapshot(folder, SOURCE, SimpleNamespace(rank=rank, size=num_savers), CPU) for rank in range(num_savers)]
    caches = [KVCache(3, rank, num_savers) for rank in range(num_savers)]
    parts = []
    for n, layout in enumerate(chunks(num_savers)):
        for rank, cache in enumerate(caches):
            filled(layout, rank, cache)
        if saves[n]:
            parts += [saver._write(cache, layout.length) for saver, cache in zip(savers, caches, strict=True)]
            for saver in savers:
                saver.read, saver.parts = layout.length, list(parts)
    wanted = data.draw(st.integers(0, len(lengths)))
    for rank in range(num_loaders):
        got, want = KVCache(3, rank, num_loaders), KVCache(3, rank, num_loaders)
        Snapshot(folder, SOURCE, SimpleNamespace(rank=rank, size=num_loaders), CPU, sum(lengths), parts).load(
            got, chunks(num_loaders)[:wanted]
        )
        for layout in chunks(num_loaders)[:wanted]:
            filled(layout, rank, want)
        assert got.layout == want.layout
        for layer in range(3 if wanted else 0):
            assert all(map(torch.equal, got.read(layer), want.read(layer)))


def test_a_part_can_be_read_by_anyone(tmp_path):
    Snapshot.new(tmp_path, SOURCE, Ring.alone(), CPU).save(filled(Layout.zigzag(5, 1), 0))
    (part,) = listed(tmp_path)["parts"]
    tensors = load_file(tmp_path / part["file"])
    assert set(tensors) == {"indices", *(f"{name}.{layer}" for name in ("keys", "values") for layer in range(3))}
    assert tensors["indices"].tolist() == [0, 1, 2, 3, 4]
    assert tensors["values.2"].shape == (5, 2, 4)
