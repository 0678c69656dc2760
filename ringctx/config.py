"""Configuration: frozen blocks, a strict YAML reader, and overrides.

A key nobody knows, a key written twice or a value of the wrong type is refused with a sentence. The number of ranks is
not here: the launcher owns it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ringctx import config_layers
from ringctx.config_attention import (
    AttentionConfig,
    BranchesConfig,
    CarryConfig,
    EncodingConfig,
    PatternConfig,
    PositionsConfig,
    ScoreConfig,
    SelectConfig,
)
from ringctx.config_cache import CacheConfig, EvictConfig, RecallConfig
from ringctx.config_layers import LayersConfig
from ringctx.config_training import ScratchConfig, TrainingConfig, VariablesConfig
from ringctx.errors import ConfigError
from ringctx.strict import StrictLoader, build, kind_of, override

__all__ = [
    "AttentionConfig",
    "BranchesConfig",
    "CacheConfig",
    "CarryConfig",
    "Config",
    "EncodingConfig",
    "EvictConfig",
    "GenerationConfig",
    "LayersConfig",
    "LayoutConfig",
    "ModelConfig",
    "PatternConfig",
    "PositionsConfig",
    "RecallConfig",
    "RingConfig",
    "ScratchConfig",
    "ScoreConfig",
    "SelectConfig",
    "TrainingConfig",
    "VariablesConfig",
    "dump",
    "load",
    "parse",
]

LEAST_SHARED = 16
"""Tokens of a page below which int8 keys would not be much smaller than bf16: a page's step and zero point are 8 bytes a channel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model, in which numbers, where."""

    path: str = "smollm2-135m-instruct"
    """A checkpoint folder in Hugging Face's form, or the name of a model that ringctx can fetch or make."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware multiplies it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each rank if there are enough, else the CPU."""
    tensor_parallel: int = 1
    """Ranks over which the weights are spread; ranks = ring x tensor_parallel, neighbours share their tokens. 1: each has them all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingConfig:
    """How ranks talk and attend."""

    timeout: float = 600.0
    """Seconds that any wait for a peer may take before it counts as lost."""
    transport: Literal["auto", "rotate", "fetch", "gather", "heads", "pass_q"] = "auto"
    """How keys travel; auto counts bytes."""
    kernel: str = "auto"
    """Which kernel attends; auto takes the first that can."""
    strict: bool = True
    """Compare at each call what the ranks were asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutConfig:
    """Which rank owns which tokens of the prompt."""

    kind: Literal["zigzag", "contiguous", "striped"] = "zigzag"
    """zigzag balances causal work; contiguous keeps windows local; striped deals tokens one by one."""
    chunk: int | None = None
    """Tokens that go through the model at once, on all ranks together; bounds the memory of reading. null for the whole prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How the answer is asked for and chosen."""

    max_new_tokens: int = 128
    """The answer ends here, or earlier at the model's end-of-text token or a stop string."""
    stop: tuple[str, ...] = ()
    """The answer ends just before the first of these texts. Special tokens are no text."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this much of the chance."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that the prompt or the answer holds by this (multiply those below 0); 1 for none."""
    seed: int = 0
    """Of the choice; the same on every rank."""
    prompt: str = "{document}\n\n{question}"
    """The user's message; the model's chat template goes around it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where `ringctx serve` listens, and how much it takes."""

    host: str = "127.0.0.1"
    """The address to listen on; one that other machines reach needs a token."""
    port: int = 8000
    """0 for any that is free."""
    token: str | None = None
    """What clients must send as a bearer token; the environment's RINGCTX_TOKEN goes before it."""
    body_bytes: int = 64 * 2**20
    """The longest body of a request."""
    queue: int = 64
    """Requests that may wait for the ring."""
    max_tokens: int = 4096
    """The longest answer that a request may ask for."""
    question_tokens: int = 2048
    """Tokens that a conversation about a document may take after it; room for them is set aside with each document."""
    documents: int = 16
    """Documents that are kept."""
    document_tokens: int = 1_000_000
    """Tokens of all of them together, and of a prompt without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All blocks of a configuration file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    attention: AttentionConfig | tuple[LayersConfig, ...] = field(default_factory=AttentionConfig)
    """One block for all layers, or a list of blocks for some of them each."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("model.tensor_parallel", self.model.tensor_parallel, 1),
            ("ring.timeout", self.ring.timeout, 0.001),
            ("layout.chunk", self.layout.chunk, 1),
            ("cache.page", self.cache.page, 1),
            ("cache.memory_gib", self.cache.memory_gib, 0.001),
            ("cache.save_every", self.cache.save_every, 1),
            ("generation.max_new_tokens", self.generation.max_new_tokens, 1),
            *((f"server.{name}", n, int(name != "port")) for name, n in dataclasses.asdict(self.server).items() if isinstance(n, int)),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}.")
        if isinstance(self.attention, tuple):
            config_layers.check(self.attention)
        self._check_storage()
        self._check_spread()
        self._check_carry()
        if "{document}" not in self.generation.prompt or "{question}" not in self.generation.prompt:
            raise ConfigError("generation.prompt must hold {document} and {question}; they are replaced by the text and the question.")
        if "" in self.generation.stop:
            raise ConfigError("generation.stop holds an empty text, which would end every answer before it begins; leave it out.")

    @property
    def positions(self) -> PositionsConfig:
        """How all layers turn positions."""
        return self._blocks[0].positions

    @property
    def selects(self) -> bool:
        """Whether some layer attends to selected keys alone."""
        return any(block.select.kind != "none" for block in self._blocks)

    @property
    def carries(self) -> bool:
        """Whether keys of some layer carry what queries said of them."""
        return any(block.carry.kind != "none" for block in self._blocks)

    @property
    def _blocks(self) -> tuple[AttentionConfig, ...]:
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)

    def _check_spread(self) -> None:
        """What decides by a rank's own heads is refused where a rank has only some: ranks of a row would decide otherwise."""
        if self.model.tensor_parallel == 1:
            return
        for name, is_set in (
            ("cache.evict", self.cache.evict.kind != "none"),
            ("cache.recall", self.cache.recall.blocks > 0),
            ("attention.select", self.selects),
            ("attention.carry", self.carries),
        ):
            if is_set:
                raise ConfigError(
                    f"{name} looks at all heads, and model.tensor_parallel leaves each rank some of them; set one of the two."
                )

    def _check_carry(self) -> None:
        """What gives keys other neighbours than they were read with is refused where they carry what these said of them."""
        if self.cache.evict.kind == "forgotten" and not all(block.carry.kind != "none" for block in self._blocks):
            raise ConfigError(
                "cache.evict.kind forgotten judges keys by what they carry; set attention.carry.kind to selective in all layers."
            )
        if self.cache.evict.bound and self.positions.kind != "none":
            raise ConfigError("cache.evict.bound knows the model's own rotation alone; leave attention.positions out, or set budgets.")
        if not self.carries:
            return
        for name, is_set in (
            ("cache.recall", self.cache.recall.blocks > 0),
            (f"cache.evict.kind {self.cache.evict.kind}", self.cache.evict.kind not in ("none", "forgotten")),
        ):
            if is_set:
                raise ConfigError(
                    f"{name} keeps some keys without what attention.carry says of them; set one of the two, or evict forgotten ones."
                )
        if self.layout.kind == "striped":
            raise ConfigError(
                "layout.kind striped deals tokens one by one, and attention.carry sums over runs of neighbours; "
                "set it to zigzag or contiguous."
            )

    def _check_storage(self) -> None:
        storage, page = self.cache.storage, self.cache.page
        if self.cache.evict.kind != "none" and self.cache.recall.blocks:
            raise ConfigError("cache.recall looks for blocks among all keys, and cache.evict drops some; set one of them, not both.")
        if self.cache.evict.kind != "none" and storage not in ("model", "bf16"):
            raise ConfigError(
                f"cache.storage is {storage}, whose keys would be rounded again where others are evicted; "
                "set it to model or bf16, or cache.evict.kind to none."
            )
        if storage == "auto" and self.cache.memory_gib is None:
            raise ConfigError("cache.storage auto needs cache.memory_gib: how much memory keys and values may take on each rank.")
        if storage != "auto" and self.cache.memory_gib is not None:
            raise ConfigError("cache.memory_gib means nothing without cache.storage: auto; set that or leave memory_gib out.")
        if storage in ("int8", "int4", "auto") and page < LEAST_SHARED:
            sentence = (
                f"cache.page is {page}, but quantised keys share a step over a page, and below {LEAST_SHARED} tokens little is saved;"
            )
            raise ConfigError(f"{sentence} set cache.page to at least {LEAST_SHARED}, or cache.storage to model or bf16.")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.sub=value` overrides in turn. Raises ConfigError for anything that cannot be right."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {str(path)!r}: {error.strerror or error}.") from error
    return parse(text, overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "the configuration") -> Config:
    """A Config from YAML text. `source` is how messages call it."""
    try:
        data = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold blocks (model:, ring:, …), not {kind_of(data)}.")
    for one in overrides:
        override(data, one)
    return build(Config, data, "")


def dump(config: Config) -> str:
    """The configuration as YAML that `parse` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
