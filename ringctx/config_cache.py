"""The `cache` block of a configuration: how keys are held, which are dropped, and which a question recalls.

See `ringctx.config`, which holds the other blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from ringctx.errors import ConfigError
from ringctx.strict import check_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig:
    """Answering from the few blocks of a long text that a question asks for; ringctx/runtime/recall.py says how they are found."""

    blocks: int = 0
    """Blocks that a question is answered from, beside the text's first and last tokens; 0 answers from the whole cache."""
    block: int = 64
    """Tokens of a block."""
    margin: int = 16
    """Tokens on either side that come along with a block, because what is asked for may lie across its border."""
    sinks: int = 64
    """First tokens of the text that every question sees."""
    recent: int = 256
    """Last tokens of the text that every question sees."""
    reread: bool = True
    """Read the blocks anew, one after the other, as a short text; false takes their keys and values as they were when all was read."""
    heads: tuple[tuple[int, ...], ...] = ()
    """Heads whose attention finds the blocks, each [layer, query head]; empty for all, which is slower and finds less."""

    def __post_init__(self) -> None:
        for name, least in (("blocks", 0), ("block", 1), ("margin", 0), ("sinks", 1), ("recent", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"cache.recall.{name} is {getattr(self, name)}; it must be at least {least}.")
        for head in self.heads:
            if len(head) != 2:
                raise ConfigError(f"cache.recall.heads holds {list(head)}; each head is written [layer, query head].")


_EVICT = {
    "none": (), "streaming": ("sinks", "recent"), "duo": ("sinks", "recent", "streaming"), "h2o": ("heavy", "recent"),
    "snapkv": ("keys", "window", "kernel", "pooling"), "pyramidkv": ("keys", "window", "kernel", "pooling", "beta"),
    "forgotten": ("budgets", "threshold", "bound"),
}  # fmt: skip
"""The keys that each kind of cache.evict takes, besides each_chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvictConfig:
    """Which keys are dropped, so that a fixed number is left; counts are for each key head, on all ranks together."""

    kind: Literal["none", "streaming", "duo", "h2o", "snapkv", "pyramidkv", "forgotten"] = "none"
    """none keeps all; the others are in ringctx/methods/eviction. All but snapkv and pyramidkv also drop after each token."""
    each_chunk: bool = False
    """Drop after each chunk (layout.chunk) too: later chunks see what is left, and the memory of reading is bounded."""
    sinks: int = 4
    """streaming, duo: first tokens of the sequence that are kept."""
    recent: int = 1024
    """streaming, duo: latest keys that a query sees, itself included. h2o: latest keys that are kept."""
    heavy: int = 1024
    """h2o: keys kept besides, those that were given most."""
    keys: int = 2048
    """snapkv: keys that are kept, the window's included. pyramidkv: on average over layers."""
    window: int = 32
    """snapkv, pyramidkv: the last queries of what was read, which vote for keys."""
    kernel: int = 5
    """snapkv, pyramidkv: neighbours whose votes are pooled, an odd number."""
    pooling: Literal["avg", "max"] = "avg"
    """snapkv, pyramidkv: how."""
    beta: int = 20
    """pyramidkv: the last layer keeps keys / beta."""
    streaming: tuple[str, ...] = ()
    """duo: the key heads that keep sinks and recent keys alone, written layer.head: ["0.1", "3.0"]; the others keep all."""
    budgets: tuple[int, ...] = ()
    """forgotten: keys that a query sees, itself included: one number for all layers, or one a layer; none for as many as there are."""
    threshold: float | None = None
    """forgotten: keys from which later queries subtract more than this are dropped in any case."""
    bound: float | None = None
    """forgotten: drop only keys that cannot matter: of each softmax at most this share is lost, such as 1e-6, whatever comes."""

    def __post_init__(self) -> None:
        check_keys("cache.evict", self, _EVICT, of_all=("each_chunk",) * (self.kind != "none"))
        for name, least in (
            ("sinks", 0),
            ("recent", 0 if self.kind == "h2o" else 1),
            ("heavy", 0),
            ("window", 1),
            ("kernel", 1),
            ("beta", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"cache.evict.{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.kind == "forgotten" and (min(self.budgets, default=2) < 2 or not (self.budgets or self.threshold or self.bound)):
            raise ConfigError(
                f"cache.evict.budgets is {list(self.budgets)} and threshold {self.threshold}; forgotten needs budgets of 2 or more, "
                "a threshold above 0, or a bound."
            )
        if self.kind == "h2o" and not self.heavy + self.recent:
            raise ConfigError("cache.evict keeps no key at all: heavy and recent are 0; keep at least 1.")
        if self.keys <= self.window:
            raise ConfigError(f"cache.evict.keys is {self.keys}, the window's {self.window} included; keep more than the window.")
        if self.kernel % 2 == 0:
            raise ConfigError(f"cache.evict.kernel is {self.kernel}; it must be odd, so that neighbours lie evenly.")
        wrong = [name for name in self.streaming if not re.fullmatch(r"\d+\.\d+", name)]
        if wrong or (self.kind == "duo" and not self.streaming):
            raise ConfigError(f"cache.evict.streaming needs key heads written layer.head, such as '0.1'; got {wrong or 'none'}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """How keys are kept for decoding."""

    page: int = 64
    """Tokens a page: memory grows by it, and a new page goes to the next rank."""
    keep_rotated: bool = True
    """Hold a rotated copy of the keys: faster decoding for half as much memory again. Only with storage: model."""
    storage: Literal["model", "bf16", "int8", "int4", "auto"] = "model"
    """How keys and values are held: as the model computes them, rounded, or quantised; auto: the first that fits memory_gib."""
    spill: str | None = None
    """A folder on a disk: keys and values lie in files there, gone when the run ends. With auto, only if nothing fits, in int8."""
    memory_gib: float | None = None
    """GiB that auto may fill with keys and values on each rank."""
    recall: RecallConfig = field(default_factory=RecallConfig)
    """Blocks of the text that a question is answered from, in the place of all of it."""
    save_every: int = 65536
    """With --save: tokens read from one save to the next, rounded up to whole chunks; the end of the prompt is always saved."""
    evict: EvictConfig = field(default_factory=EvictConfig)
    """Which keys are dropped."""
