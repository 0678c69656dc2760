"""Snapshots on ranks: what one rank finds wrong is the same sentence on all, and nobody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ringctx.core.layout import Layout
from ringctx.errors import ConfigError
from ringctx.runtime.cache import KVCache
from ringctx.runtime.snapshot import Snapshot
from tests.pool import Pool

SOURCE, CPU = {"model": "a digest", "cache.storage": "model"}, torch.device("cpu")


def _filled(ring: Any) -> KVCache:
    cache, layout = KVCache(2, ring.rank, ring.size), Layout.zigzag(13, ring.size)
    cache.extend(layout)
    for layer in range(2):
        keys = layout.indices(ring.rank)[None, :, None, None].float().expand(1, -1, 2, 4)
        cache.append(layer, keys, -keys)
    return cache


def _save(ring: Any, folder: str) -> str:
    try:
        Snapshot.new(Path(folder), SOURCE, ring, CPU).save(_filled(ring))
    except ConfigError as error:
        return str(error)
    return "saved"


def _load(ring: Any, folder: str) -> Any:
    cache = KVCache(2, ring.rank, ring.size)
    try:
        Snapshot.open(Path(folder), SOURCE, ring, CPU).load(cache, [Layout.zigzag(13, ring.size)])
    except ConfigError as error:
        return str(error)
    k, v = cache.read(1)
    return torch.equal(k, _filled(ring).read(1)[0]) and torch.equal(v, -k)


def test_what_three_ranks_saved_two_load(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(_save, str(tmp_path), size=3) == ["saved"] * 3
    assert pool.run(_load, str(tmp_path), size=2) == [True, True]


def test_a_flipped_byte_that_one_rank_finds_is_named_by_all(pool: Pool, tmp_path: Path) -> None:
    pool.run(_save, str(tmp_path), size=3)
    part = tmp_path / "part-0-13-rank2.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    first, second = pool.run(_load, str(tmp_path), size=2)
    assert first == second
    assert first.startswith("part-0-13-rank2.safetensors of the snapshot in")


def test_a_rank_that_cannot_write_is_one_sentence_on_all_and_there_is_no_snapshot(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "part-0-13-rank1.safetensors").mkdir()
    (sentence,) = set(pool.run(_save, str(tmp_path), size=3))
    assert "cannot be written: Is a directory" in sentence
    assert not (tmp_path / "snapshot.json").exists()
