"""Budget: how keys and values are held so that they fit the memory a rank may use.

Knows sizes and the configuration. Knows nothing of tensors: every rank comes to the same choice without a word exchanged.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from ringctx.config import CacheConfig
from ringctx.errors import ConfigError
from ringctx.runtime.storage import BITS, KINDS, SCALES

logger = logging.getLogger(__name__)

GIB = 2**30


class Shape(NamedTuple):
    """A model's keys and values: layers, key heads, numbers a head, and their dtype."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype


def num_bytes(kind: str, tokens: int, shape: Shape, page: int, *, keep_rotated: bool = False) -> int:
    """Memory that so many tokens take at most, for a batch of one, when that much room is set aside beforehand."""
    numbers, capacity = shape.heads * shape.width, -(-tokens // page) * page
    if kind not in BITS:
        copies = 3 if keep_rotated and kind == "model" else 2
        return shape.layers * copies * capacity * numbers * (2 if kind == "bf16" else shape.dtype.itemsize)
    codes = shape.heads * -(-shape.width * BITS[kind] // 8)
    keys = tokens // page * (page * codes + numbers * SCALES)
    values = capacity * (codes + shape.heads * SCALES)
    originals = (page - 1) * numbers * shape.dtype.itemsize  # of the open page of keys
    return shape.layers * (keys + values + originals)


def choose(config: CacheConfig, tokens: int, shape: Shape) -> tuple[str, Path | None]:
    """Which kind of storage, and in which folder (None: in memory), when the fullest rank will hold `tokens`.

    auto: the first of model, bf16, int8, int4 that fits cache.memory_gib in memory; if none does and cache.spill names a folder,
    int8 there: a quarter of fp32's bytes to read back, at a small error. Raises ConfigError if none fits and there is no folder.
    """
    spill = None if config.spill is None else Path(config.spill)
    if config.storage != "auto":
        return config.storage, spill
    assert config.memory_gib is not None
    sizes = {kind: num_bytes(kind, tokens, shape, config.page, keep_rotated=config.keep_rotated) / GIB for kind in KINDS}
    taken = ", ".join(f"{kind} {size:.3g}" for kind, size in sizes.items())
    why = f"{tokens} tokens on the fullest rank take, in GiB: {taken}; cache.memory_gib is {config.memory_gib:g}"
    for kind, size in sizes.items():
        if size <= config.memory_gib:
            logger.info("Keys and values are held in memory as %s, the first that fits: %s.", kind, why)
            return kind, None
    if spill is None:
        raise ConfigError(f"No storage fits: {why}. Raise it, use more ranks, or name a folder in cache.spill.")
    logger.info("Keys and values are held as int8 in files in %s, because no kind fits in memory: %s.", spill, why)
    return "int8", spill
