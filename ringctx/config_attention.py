"""The `attention` block of a configuration: what is attended, at which positions, and which keys are selected.

See `ringctx.config`, which holds the other blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ringctx.errors import ConfigError
from ringctx.strict import check_keys

_POSITIONS = {
    "none": (), "pi": ("factor",), "ntk": ("factor",), "dynamic_ntk": ("factor",),
    "yarn": ("factor", "beta_fast", "beta_slow"), "longrope": ("factor", "short", "long"),
    "clex": ("factor", "flow"),
}  # fmt: skip
"""The keys that each kind of attention.positions takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionsConfig:
    """How rotary frequencies are rescaled for more tokens than the model was trained on."""

    kind: Literal["none", "pi", "ntk", "dynamic_ntk", "yarn", "longrope", "clex"] = "none"
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
    flow: str | None = None
    """clex: the safetensors file of a trained flow; null for one that has not begun to learn, which is NTK-aware scaling."""

    def __post_init__(self) -> None:
        check_keys("attention.positions", self, _POSITIONS)
        if self.kind != "none" and (self.factor is None or not 1 <= self.factor < math.inf):
            given = "missing" if self.factor is None else self.factor
            raise ConfigError(f"attention.positions.factor is {given}; {self.kind} needs at least 1, such as 4 for four times the length.")
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(
                f"attention.positions.beta_slow is {self.beta_slow} and beta_fast is {self.beta_fast}; 0 < beta_slow < beta_fast."
            )
        if self.kind == "longrope" and not (self.short and self.long):
            raise ConfigError("longrope needs attention.positions.short and .long, each a list of one number a pair of rotated dims.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingConfig:
    """How queries and keys know where they are. Of models trained so: CoCA, or no position at all in some layers."""

    kind: Literal["rotary", "coca", "coca_strict", "none"] = "rotary"
    """rotary is the model's own; coca multiplies what the key projection gives by both turned and plain queries; none turns nothing."""
    log_n: int | None = None
    """Queries grow with the logarithm of the keys they may see, over that of this many tokens; null for no growth."""
    least: float = 1.0
    """log_n: the least that queries are multiplied by; 0 lets them shrink below so many tokens too."""

    def __post_init__(self) -> None:
        if self.log_n is not None and self.log_n < 2:
            raise ConfigError(f"attention.encoding.log_n is {self.log_n}; it is a number of tokens, 2 or more, such as those of training.")
        if self.log_n is None and self.least != 1:
            raise ConfigError("attention.encoding.least means nothing without log_n; set log_n, or leave it out.")
        if not 0 <= self.least < math.inf:
            raise ConfigError(f"attention.encoding.least is {self.least}; it is what queries are multiplied by at least, 0 or more.")


_PATTERNS = {
    "causal": (), "atrous": ("rate",), "sparse": ("rate",), "strided": ("length",), "fixed": ("length", "summaries"),
    "longformer": ("window", "tokens"), "bigbird": ("window", "tokens", "block", "random", "seed"), "star": ("block", "context"),
}  # fmt: skip
"""The keys that each kind of attention.pattern takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatternConfig:
    """Which earlier tokens a token sees; a pattern of the papers, with `window` and `sinks` beside it narrowing it further."""

    kind: Literal["causal", "atrous", "sparse", "strided", "fixed", "longformer", "bigbird", "star"] = "causal"
    """causal: all. atrous: every rate-th; sparse: those and the latest `rate`. strided and fixed are Sparse Transformer's, star is Star
    Attention's."""
    rate: int | None = None
    """atrous, sparse: the distance from one key seen to the next."""
    length: int | None = None
    """strided: the distance between keys seen far away; fixed: tokens of a segment."""
    summaries: int | None = None
    """fixed: the last tokens of each segment, which all later ones see."""
    window: int | None = None
    """longformer, bigbird: latest keys, the token itself included."""
    tokens: tuple[int, ...] | None = None
    """longformer, bigbird: tokens that see all and that all see, by index."""
    block: int | None = None
    """bigbird, star: tokens of a block."""
    random: int | None = None
    """bigbird: blocks that are drawn for each block of queries."""
    seed: int | None = None
    """bigbird: of the draw; 0 by default."""
    context: int | None = None
    """star: tokens of the document, which see the first block and their own; later ones see all."""

    def __post_init__(self) -> None:
        check_keys("attention.pattern", self, _PATTERNS)
        for key in _PATTERNS[self.kind]:
            if getattr(self, key) is None and key != "seed":
                raise ConfigError(f"attention.pattern.{key} is missing; {self.kind} needs it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is done to logits, for models trained so; a model's own softcap is there without it."""

    kind: Literal["alibi", "softcap"]
    """alibi: a slope a head, times the distance (set encoding.kind to none); softcap: cap tanh(x / cap)."""
    cap: float | None = None
    """softcap: what logits stay below."""

    def __post_init__(self) -> None:
        if (self.cap is None) != (self.kind == "alibi"):
            said = "means nothing" if self.kind == "alibi" else "is missing"
            raise ConfigError(f"attention.scores.cap {said} with kind {self.kind}; write {{kind: alibi}} or {{kind: softcap, cap: 50}}.")


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
        check_keys("attention.branches", self, _BRANCHES)
        for key in _BRANCHES[self.kind]:
            value = getattr(self, key)
            if value is None and key != "length":
                raise ConfigError(f"attention.branches.{key} is missing; {self.kind} needs it: a number of 1 or more.")
            if value is not None and not 1 <= value < math.inf:
                raise ConfigError(f"attention.branches.{key} is {value}; it must be at least 1.")


_SELECT = {
    "none": (), "vertical_slash": ("verticals", "slashes", "last", "first", "near", "tile"), "a_shape": ("initial", "local"),
    "flex_prefill": ("gamma", "tau", "least", "block"), "x_attention": ("threshold", "stride", "block"),
    "sparge": ("similarity", "mass"), "quest": ("blocks", "block"), "moba": ("blocks", "block"),
    "representatives": ("blocks", "block", "representatives", "initial", "local"),
}  # fmt: skip
"""The keys that each kind of attention.select takes, dense_layers besides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """Which keys are worth attending to, decided from queries and keys; null leaves a method's own default."""

    kind: Literal["none", "vertical_slash", "a_shape", "flex_prefill", "x_attention", "sparge", "quest", "representatives", "moba"] = "none"
    """none attends to all; quest selects while decoding, a_shape, representatives and moba always, the others while reading."""
    dense_layers: int = 0
    """The first layers, which attend to all."""
    verticals: int | None = None
    """vertical_slash: columns of keys that a head keeps."""
    slashes: int | None = None
    """vertical_slash: diagonals that a head keeps."""
    last: int | None = None
    """vertical_slash: the last queries, which decide."""
    first: int | None = None
    """vertical_slash: first keys that are columns in any case."""
    near: int | None = None
    """vertical_slash: nearest diagonals that are kept in any case."""
    tile: int | None = None
    """vertical_slash: the edge of the squares that diagonals are widened to."""
    initial: int | None = None
    """a_shape, representatives: first keys that all see."""
    local: int | None = None
    """a_shape, representatives: latest keys that a token sees."""
    gamma: float | None = None
    """flex_prefill: the share of attention to keep."""
    tau: float | None = None
    """flex_prefill: the distance below which a head decides by pooled products."""
    least: int | None = None
    """flex_prefill: tokens that are always kept."""
    threshold: float | None = None
    """x_attention: the share of a row's antidiagonal attention to keep."""
    stride: int | None = None
    """x_attention: tokens of a cell."""
    similarity: float | None = None
    """sparge: how alike a block's tokens must be for their mean to stand for them."""
    mass: float | None = None
    """sparge: the share of pooled attention to keep."""
    blocks: int | None = None
    """quest, representatives, moba: blocks (quest: pages) of keys that a query sees."""
    block: int | None = None
    """flex_prefill, x_attention, quest, representatives, moba: tokens of a block (quest: of a page)."""
    representatives: int | None = None
    """representatives: keys of a block that stand for it."""

    def __post_init__(self) -> None:
        if self.dense_layers < 0 or (self.dense_layers and self.kind == "none"):
            raise ConfigError(
                f"attention.select.dense_layers is {self.dense_layers}; it counts layers, 0 or more, and needs a kind but none."
            )
        check_keys("attention.select", self, _SELECT, of_all=("dense_layers",))


@dataclass(frozen=True, kw_only=True, slots=True)
class CarryConfig:
    """What queries say of earlier keys, which later queries take into account."""

    kind: Literal["none", "selective"] = "none"
    """selective: Selective Attention, for models trained with it: what head 0 gives to a key, all later queries subtract."""
    tau: float = 1.0
    """The sum at which a key counts as forgotten where memory is measured, as in the memory loss of training."""

    def __post_init__(self) -> None:
        if not 0 < self.tau < math.inf:
            raise ConfigError(f"attention.carry.tau is {self.tau}; it must be more than 0, such as the paper's 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """What is attended, on top of the model's own (causal) attention."""

    window: int | None = None
    """Keys that a token sees, itself included; null for all before it."""
    sinks: int = 0
    """First tokens of the sequence that all see in spite of the window."""
    pattern: PatternConfig = field(default_factory=PatternConfig)
    """Which earlier tokens a token sees: a pattern of the papers."""
    scores: tuple[ScoreConfig, ...] = ()
    """What is done to logits: softcaps first, then alibi."""
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    """How the model reads on past its trained length: by other frequencies."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """How queries and keys know where they are."""
    branches: BranchesConfig = field(default_factory=BranchesConfig)
    """How the model reads on past its trained length: by other distances. window and sinks above narrow what branches see."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Which keys are worth attending to."""
    carry: CarryConfig = field(default_factory=CarryConfig)
    """What queries say of earlier keys."""

    def __post_init__(self) -> None:
        if self.branches.kind != "none" and self.encoding.kind != "rotary":
            raise ConfigError(
                f"attention.branches turn by rotary positions of their own, and attention.encoding.kind is {self.encoding.kind}; "
                "set one of the two."
            )
        for name in ("branches", "select"):
            if self.carry.kind != "none" and getattr(self, name).kind != "none":
                raise ConfigError(
                    f"attention.carry needs every query to meet every key that it sees once, and attention.{name} changes that; "
                    "set one of the two."
                )
        for name, value, least in (("window", self.window, 1), ("sinks", self.sinks, 0)):
            if value is not None and value < least:
                raise ConfigError(f"attention.{name} is {value}; it must be at least {least}.")
        if self.sinks and self.window is None:
            raise ConfigError("attention.sinks means nothing without attention.window; set a window or leave sinks out.")
