"""Configuration: frozen blocks, a strict YAML reader, and overrides.

A key nobody knows, a key written twice or a value of the wrong type is refused with a sentence. The number of ranks is
not here: the launcher owns it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from ringctx.errors import ConfigError
from ringctx.strict import StrictLoader, build, kind_of, override

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


_POSITIONS = {
    "none": (), "pi": ("factor",), "ntk": ("factor",), "dynamic_ntk": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow"), "longrope": ("factor", "short", "long"),
}  # fmt: skip
"""The keys that each kind of attention.positions takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionsConfig:
    """How rotary frequencies are rescaled for more tokens than the model was trained on."""

    kind: Literal["none", "pi", "ntk", "dynamic_ntk", "yarn", "longrope"] = "none"
    """none leaves the model's own; yarn is the usual choice without fine-tuning; the equations are in ringctx/methods/extend.py."""
    factor: float | None = None
    """How many times the trained length is to be served; dynamic_ntk stretches by the prompt and answer's length, faster with a factor."""
    beta_fast: float = 32.0
    """yarn: pairs of dims that turn so often within the trained length, or more often, are left alone."""
    beta_slow: float = 1.0
    """yarn: pairs of dims that turn so often, or less often, are interpolated."""
    short: tuple[float, ...] = ()
    """longrope: what each pair's frequency is divided by up to the trained length."""
    long: tuple[float, ...] = ()
    """longrope: what each pair's frequency is divided by beyond it."""

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            if key.name not in ("kind", *_POSITIONS[self.kind]) and getattr(self, key.name) != key.default:
                others = ", ".join(kind for kind, keys in _POSITIONS.items() if key.name in keys)
                raise ConfigError(
                    f"attention.positions.{key.name} means nothing with kind {self.kind}; leave it out, or set kind to {others}."
                )
        if self.kind != "none" and (self.factor is None or not 1 <= self.factor < math.inf):
            given = "missing" if self.factor is None else self.factor
            raise ConfigError(f"attention.positions.factor is {given}; {self.kind} needs at least 1, such as 4 for four times the length.")
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(
                f"attention.positions.beta_slow is {self.beta_slow} and beta_fast is {self.beta_fast}; 0 < beta_slow < beta_fast."
            )
        if self.kind == "longrope" and not (self.short and self.long):
            raise ConfigError("longrope needs attention.positions.short and .long, each a list of one number a pair of rotated dims.")


_BRANCHES = {
    "none": (), "rerope": ("window",), "leaky_rerope": ("window", "factor"), "self_extend": ("window", "group"),
    "lm_infinite": ("window", "sinks", "length"), "streaming": ("window", "sinks"), "dual_chunk": ("chunk", "length"),
}  # fmt: skip
"""The keys that each kind of attention.branches takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchesConfig:
    """Distances between tokens other than how far apart they are, for sequences longer than the model was trained on."""

    kind: Literal["none", "rerope", "leaky_rerope", "self_extend", "lm_infinite", "streaming", "dual_chunk"] = "none"
    """none leaves distances alone; dual_chunk and self_extend see everything, lm_infinite and streaming sinks and a window alone;
    the equations are in ringctx/methods/branches.py."""
    window: int | None = None
    """Latest keys, the token itself included, whose distances stay what they are. dual_chunk has chunks instead."""
    factor: float | None = None
    """leaky_rerope: how many times slower distances grow beyond the window."""
    group: int | None = None
    """self_extend: tokens that share a position beyond the window."""
    sinks: int | None = None
    """lm_infinite, streaming: first tokens of the sequence that all see in spite of the window."""
    chunk: int | None = None
    """dual_chunk: tokens a chunk; shorter than `length`, such as 3/4 of it."""
    length: int | None = None
    """dual_chunk, lm_infinite: the trained length; null for the model's own (dual_chunk) or the window (lm_infinite)."""

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self)[1:]:
            value, is_taken = getattr(self, key.name), key.name in _BRANCHES[self.kind]
            if value is not None and not is_taken:
                others = ", ".join(kind for kind, keys in _BRANCHES.items() if key.name in keys)
                raise ConfigError(
                    f"attention.branches.{key.name} means nothing with kind {self.kind}; leave it out, or set kind to {others}."
                )
            if value is None and is_taken and key.name != "length":
                raise ConfigError(f"attention.branches.{key.name} is missing; {self.kind} needs it: a number of 1 or more.")
            if value is not None and not 1 <= value < math.inf:
                raise ConfigError(f"attention.branches.{key.name} is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """What is attended, on top of the model's own (causal) attention."""

    window: int | None = None
    """Keys that a token sees, itself included; null for all before it."""
    sinks: int = 0
    """First tokens of the sequence that all see in spite of the window."""
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    """How the model reads on past its trained length: by other frequencies."""
    branches: BranchesConfig = field(default_factory=BranchesConfig)
    """How the model reads on past its trained length: by other distances. window and sinks above narrow what branches see."""


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
}  # fmt: skip
"""The keys that each kind of cache.evict takes, besides each_chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvictConfig:
    """Which keys are dropped, so that a fixed number is left; counts are for each key head, on all ranks together."""

    kind: Literal["none", "streaming", "duo", "h2o", "snapkv", "pyramidkv"] = "none"
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

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            if (
                key.name not in ("kind", *_EVICT[self.kind], *["each_chunk"] * (self.kind != "none"))
                and getattr(self, key.name) != key.default
            ):
                others = ", ".join(kind for kind, keys in _EVICT.items() if key.name in keys) or "one that evicts"
                raise ConfigError(f"cache.evict.{key.name} means nothing with kind {self.kind}; leave it out, or set kind to {others}.")
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
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("ring.timeout", self.ring.timeout, 0.001),
            ("attention.window", self.attention.window, 1),
            ("attention.sinks", self.attention.sinks, 0),
            ("layout.chunk", self.layout.chunk, 1),
            ("cache.page", self.cache.page, 1),
            ("cache.memory_gib", self.cache.memory_gib, 0.001),
            ("cache.save_every", self.cache.save_every, 1),
            ("generation.max_new_tokens", self.generation.max_new_tokens, 1),
            *((f"server.{name}", n, int(name != "port")) for name, n in dataclasses.asdict(self.server).items() if isinstance(n, int)),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}.")
        if self.attention.sinks and self.attention.window is None:
            raise ConfigError("attention.sinks means nothing without attention.window; set a window or leave sinks out.")
        self._check_storage()
        if "{document}" not in self.generation.prompt or "{question}" not in self.generation.prompt:
            raise ConfigError("generation.prompt must hold {document} and {question}; they are replaced by the text and the question.")
        if "" in self.generation.stop:
            raise ConfigError("generation.stop holds an empty text, which would end every answer before it begins; leave it out.")

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
