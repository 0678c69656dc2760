"""Methods: how a model is trained, and how it is read on beyond what it was trained on; each an `attention` block.

A block is written as in a configuration file. Numbers in it come from the trained length n and the length L that is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

TRAINED = {
    "rope": "{}",
    "coca": "{encoding: {kind: coca}}",
    "alibi": "{encoding: {kind: none}, scores: [{kind: alibi}]}",
    "log_n": "{encoding: {log_n: %d}}",
    "hwfa": "[{layers: %d, encoding: {kind: none, log_n: %d}}, {window: 16}]",
}
"""Models by the name of what they are trained with."""


@dataclass(frozen=True)
class Method:
    """trained: of TRAINED. tested: the attention block at L tokens of a model trained on n; None for the block of training."""

    trained: str
    tested: Callable[[int, int], str] | None = None


def _times(n: int, L: int) -> float:
    return max(1.0, L / n)


def _group(n: int, L: int) -> int:
    """The fewest tokens that share a position in Self-Extend, after a window of n / 2, so that the farthest key stays nearer than n."""
    window = n // 2
    return next(group for group in itertools.count(1) if (L - 1) // group + window - window // group < n)


METHODS: dict[str, Method] = {
    "rope": Method("rope"),
    "window": Method("rope", lambda n, L: f"{{window: {n}}}"),
    "pi": Method("rope", lambda n, L: f"{{positions: {{kind: pi, factor: {_times(n, L)}}}}}"),
    "ntk": Method("rope", lambda n, L: f"{{positions: {{kind: ntk, factor: {_times(n, L)}}}}}"),
    "dynamic_ntk": Method("rope", lambda n, L: "{positions: {kind: dynamic_ntk, factor: 1}}"),
    "yarn": Method("rope", lambda n, L: f"{{positions: {{kind: yarn, factor: {_times(n, L)}}}}}"),
    "rerope": Method("rope", lambda n, L: f"{{branches: {{kind: rerope, window: {n // 2}}}}}"),
    "self_extend": Method("rope", lambda n, L: f"{{branches: {{kind: self_extend, window: {n // 2}, group: {_group(n, L)}}}}}"),
    "lm_infinite": Method("rope", lambda n, L: f"{{branches: {{kind: lm_infinite, window: {n}, sinks: 4}}}}"),
    "dual_chunk": Method("rope", lambda n, L: f"{{branches: {{kind: dual_chunk, chunk: {3 * n // 4}, length: {n}}}}}"),
    "rope, log n when tested": Method("rope", lambda n, L: f"{{encoding: {{log_n: {n}}}}}"),
    "rerope, log n when tested": Method("rope", lambda n, L: f"{{branches: {{kind: rerope, window: {n // 2}}}, encoding: {{log_n: {n}}}}}"),
    "log n": Method("log_n"),
    "log n, dynamic_ntk": Method("log_n", lambda n, L: f"{{encoding: {{log_n: {n}}}, positions: {{kind: dynamic_ntk, factor: 1}}}}"),
    "coca": Method("coca"),
    "coca, dynamic_ntk": Method("coca", lambda n, L: "{encoding: {kind: coca}, positions: {kind: dynamic_ntk, factor: 1}}"),
    "coca, ntk": Method("coca", lambda n, L: f"{{encoding: {{kind: coca}}, positions: {{kind: ntk, factor: {_times(n, L)}}}}}"),
    "alibi": Method("alibi"),
    "hwfa": Method("hwfa"),
}
"""What `--method` takes."""
BASELINE = "window"
"""What every method must beat, and is always measured: the trained length as a window (Su, kexue.fm/archives/9431)."""


def trained_block(name: str, length: int, layers: int) -> str:
    """The attention block by which a model of so many layers is trained on so many tokens."""
    block = TRAINED[name]
    numbers = {"log_n": (length,), "hwfa": (layers - 1, length)}.get(name, ())
    return block % numbers if numbers else block


def reading_block(name: str, length: int, layers: int, tested: int) -> str:
    """The attention block by which a method reads `tested` tokens with a model trained on `length`."""
    method = METHODS[name]
    return trained_block(method.trained, length, layers) if method.tested is None else method.tested(length, tested)
