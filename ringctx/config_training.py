"""The `training` block of a configuration: what is learned from what, for how long, and where it is kept.

See `ringctx.config`, which holds the other blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ringctx.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ScratchConfig:
    """A Llama with random weights; its embeddings serve input and output."""

    layers: int = 0
    """0: no model from scratch; `model.path` is trained on."""
    hidden: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads; their width is hidden / heads."""
    key_heads: int = 4
    """Key and value heads, which divide the query heads."""
    intermediate: int = 384
    """Width of the MLPs."""
    vocabulary: int = 2048
    """Tokens of the tokenizer that is trained on the text; of data: variables the task's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariablesConfig:
    """Names are assigned values again and again, among tokens that mean nothing; asked for is the latest value of a name."""

    names: int = 8
    """Distinct variables."""
    values: int = 16
    """Distinct values."""
    noise: int = 6
    """Most tokens without meaning after a statement, of so many kinds."""
    asked: float = 0.2
    """The share of statements that are questions."""
    longer: tuple[int, ...] = (2, 4)
    """Held-out texts are also so many times longer than `context`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What `ringctx train` does."""

    data: Literal["text", "variables"] = "text"
    """text: Python's standard library and the King James Bible; variables: see below."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """The model, where it is made anew."""
    variables: VariablesConfig = field(default_factory=VariablesConfig)
    """The task of data: variables."""
    passkeys: float = 0.0
    """The share of a step's texts in which a number is hidden, and asked for at the end."""
    context: int = 512
    """Tokens of a sequence, spread over the ring."""
    batch: int = 16
    """Sequences a step."""
    steps: int = 1000
    """Optimizer steps in all."""
    learning_rate: float = 1e-3
    """At its highest: it rises over `warmup` steps and falls along a cosine to a tenth."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    tile: int = 0
    """The most tokens of a rank whose MLP and logits exist at a time; 0 for all."""
    recompute: bool = False
    """Compute layers again in backward, all but attention, instead of keeping what they computed."""
    offload: bool = False
    """With recompute: keep layers' inputs in the host's memory instead of the GPU's."""
    weight_decay: float = 0.1
    """Of AdamW, on matrices alone."""
    clip: float = 1.0
    """The largest norm of all gradients together."""
    memory_loss: float = 0.0
    """How much a key that is not forgotten costs (Selective Attention's epsilon); needs attention.carry."""
    memory_from: int = 0
    """Steps before the memory loss counts: from the start it may make a model forget before it has learned anything."""
    seed: int = 0
    """Of weights and of what is drawn from the data; the same on every rank."""
    out: str = "runs/train"
    """The folder of checkpoints, logs and pictures; a run goes on from the newest checkpoint in it."""
    save_every: int = 500
    """Steps between checkpoints; the newest is kept."""
    evaluate_every: int = 250
    """Steps between measurements on held-out data."""
    held_out: int = 64
    """Held-out sequences."""

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2), ("batch", 1), ("steps", 1), ("warmup", 0), ("save_every", 1), ("evaluate_every", 1), ("held_out", 1),
            ("learning_rate", 0.0), ("weight_decay", 0.0), ("clip", 0.0), ("memory_loss", 0.0), ("memory_from", 0), ("tile", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"training.{name} is {getattr(self, name)}; it must be at least {least}.")
        scratch, task = self.scratch, self.variables
        if not 0 <= self.passkeys <= 1 or (self.passkeys and self.data != "text"):
            raise ConfigError(f"training.passkeys is {self.passkeys}; it is a share of the texts of data: text, from 0 to 1.")
        if scratch.layers and (scratch.hidden % scratch.heads or scratch.heads % scratch.key_heads):
            raise ConfigError(
                f"training.scratch has hidden {scratch.hidden}, heads {scratch.heads} and key_heads {scratch.key_heads}; "
                "heads must divide hidden, and key_heads divide heads."
            )
        if self.offload and not self.recompute:
            raise ConfigError("training.offload moves what training.recompute keeps; set training.recompute to true, or offload to false.")
        if self.data == "variables" and not scratch.layers:
            raise ConfigError("training.data variables has tokens of its own; set training.scratch.layers for a model of them.")
        if not (task.names >= 1 and task.values >= 1 and task.noise >= 0 and 0 < task.asked < 1):
            raise ConfigError("training.variables needs names and values of 1 or more, noise of 0 or more, and asked between 0 and 1.")
